"""Checkpoints: a run goes on to the same losses, damaged ones are passed over, a full disk is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from echovideo.errors import StorageError, TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training import checkpoint
from echovideo.training.checkpoint import Checkpoints, Progress, damage
from echovideo.training.loop import Trainer, Validate, train
from echovideo.training.settings import AverageSettings, StageSettings
from tests.echovideo.training.small import Kept, SmallSource, null_condition, schedule, settings, small_model

CHOSEN = settings(steps=9, checkpoint_every=3, average=AverageSettings(decay=0.9))


class _StoppedError(Exception):
    """Stands for the end of the process."""


class _StoppingSource(SmallSource):
    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if step == 7:
            raise _StoppedError
        return super().batch(step, rank, world_size)


def _run(
    folder: Path,
    chosen: StageSettings = CHOSEN,
    source: SmallSource | None = None,
    base: str = "base",
    dtype: torch.dtype = torch.float32,
    validate: Validate | None = None,
) -> tuple[EchoVideoTransformer3DModel, Kept, Progress]:
    model, kept = small_model().to(dtype), Kept()
    checkpoints = Checkpoints(folder, chosen, base)
    try:
        progress = train(
            model,
            schedule(),
            source or SmallSource(),
            null_condition(),
            chosen,
            checkpoints=checkpoints,
            record=kept,
            validate=validate,
        )
    except _StoppedError:
        checkpoints.wait()
        progress = Progress()
    return model, kept, progress


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_after_a_stop_goes_on_to_the_same_losses_and_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    whole, every, _ = _run(tmp_path / "whole", dtype=dtype)
    _run(tmp_path / "parts", source=_StoppingSource(), dtype=dtype)
    assert _names(tmp_path / "parts") == ["step-00000003", "step-00000006"]
    rest, late, progress = _run(tmp_path / "parts", dtype=dtype)
    assert [found.step for found in late.steps] == [6, 7, 8]
    assert late.losses == every.losses[6:]
    assert (progress.steps, progress.loss) == (9, every.losses[-1])
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, rest.get_parameter(name)), name


def test_train_that_was_finished_takes_no_step_and_returns_its_weights(tmp_path: Path) -> None:
    first, _, progress = _run(tmp_path)
    again, late, same = _run(tmp_path)
    assert late.steps == []
    assert same == progress
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)


def test_restore_fills_averages_and_moments_to_the_bit(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(small_model().bfloat16(), schedule(), null_condition(), CHOSEN)

    one, other = trainer(), trainer()
    for step in range(3):
        one.take(SmallSource().batch(step, 0, 1))
    checkpoints = Checkpoints(tmp_path, CHOSEN, "base")
    checkpoints.save(one.optimizer, Progress(steps=3, skipped=1, scores={"score": 0.5}))
    before = {kind: _copied(part) for kind, part in one.optimizer.state().items()}
    # Written beside the training: what follows must not reach the file.
    one.take(SmallSource().batch(3, 0, 1))
    checkpoints.wait()
    assert checkpoints.restore(other.optimizer) == Progress(steps=3, skipped=1, scores={"score": 0.5})
    for kind, part in other.optimizer.state().items():
        found = _copied(part)
        assert found.keys() == before[kind].keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in before[kind].items()), kind
    assert torch.equal(other.model.proj_out.weight, other.optimizer.masters["proj_out.weight"].to(torch.bfloat16))


def _copied(part: Mapping[str, torch.Tensor] | torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in (part if isinstance(part, dict) else {"": part}).items()}  # type: ignore[union-attr]


def _truncate(path: Path) -> str:
    file = path / "__0_0.distcp"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 100)
    return f"__0_0.distcp has {size - 100} of {size} bytes"


def _flip(path: Path) -> str:
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "__0_0.distcp does not have its sha256"


def _remove_metadata(path: Path) -> str:
    (path / ".metadata").unlink()
    return ".metadata is missing"


def _cut_manifest(path: Path) -> str:
    (path / "manifest.json").write_text('{"schema"')
    return "manifest.json cannot be read (JSONDecodeError"


def _newer_schema(path: Path) -> str:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 2}))
    return "schema 2, expected 1"


@pytest.mark.parametrize("spoil", [_truncate, _flip, _remove_metadata, _cut_manifest, _newer_schema])
def test_train_with_a_damaged_checkpoint_passes_it_over_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Any
) -> None:
    _, every, _ = _run(tmp_path)
    assert _names(tmp_path) == ["step-00000006", "step-00000009"]
    problem = spoil(tmp_path / "step-00000009")
    _, late, _ = _run(tmp_path)
    message = capfd.readouterr().err
    assert f"checkpoint {tmp_path / 'step-00000009'} is passed over: " in message
    assert problem in message
    assert late.losses == every.losses[6:]
    assert damage(tmp_path / "step-00000009") is None


def test_checkpoints_that_nobody_lived_to_finish_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.writing").mkdir()
    Checkpoints(tmp_path, CHOSEN, "base")
    assert _names(tmp_path) == []


def test_checkpoints_keep_the_best_by_validation_beside_the_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(steps=5, checkpoint_every=5, validate_every=1, keep_checkpoints=1)
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.9, 5: 0.3}
    _run(tmp_path, chosen, validate=lambda _, steps: {"score": scores[steps], "other": 1.0})
    assert _names(tmp_path) == ["step-00000004", "step-00000005"]
    checkpoints = Checkpoints(tmp_path, chosen, "base")
    assert checkpoints.best() == tmp_path / "step-00000004"
    assert checkpoints.last() == tmp_path / "step-00000005"
    trainer = Trainer(small_model(), schedule(), null_condition(), chosen)
    assert checkpoints.restore(trainer.optimizer, checkpoints.best()).scores == {"score": 0.9, "other": 1.0}
    problem = _truncate(tmp_path / "step-00000004")
    assert checkpoints.best() == tmp_path / "step-00000005"
    assert f"step-00000004 is passed over: {problem}" in capfd.readouterr().err


def test_train_with_other_settings_or_base_than_its_checkpoints_is_refused(tmp_path: Path) -> None:
    _run(tmp_path)
    other = settings(steps=9, checkpoint_every=3, average=AverageSettings(decay=0.9), clip_norm=2.0)
    with pytest.raises(TrainingError, match=r"clip_norm is 1.0 there and 2.0 here\. Use its settings") as caught:
        _run(tmp_path, other)
    assert caught.value.code == "resume"
    with pytest.raises(TrainingError, match="base is 'base' there and 'another' here"):
        _run(tmp_path, base="another")


def test_train_that_stops_for_numbers_that_are_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"The last good checkpoint is {tmp_path / 'step-00000003'}"):
        _run(tmp_path, source=SmallSource(broken=(3, 4, 5)))
    with pytest.raises(TrainingError, match="There is no checkpoint yet"):
        _run(tmp_path / "other", source=SmallSource(broken=(0, 1, 2)))


def test_save_without_room_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, every, _ = _run(tmp_path, source=_StoppingSource())
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(StorageError, match=r"0.000 GB are free\. Free some space") as caught:
            _run(tmp_path)
    assert caught.value.code == "disk_full"
    assert _names(tmp_path) == ["step-00000003", "step-00000006"]
    _, late, _ = _run(tmp_path)
    assert len(every.losses) + len(late.losses) == 9


def test_save_on_a_disk_that_fills_up_meanwhile_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path, source=_StoppingSource())
    save = checkpoint.async_save

    def to_a_full_device(state: Any, *, checkpoint_id: Path, **among: Any) -> Any:
        (checkpoint_id / "__0_0.distcp").symlink_to("/dev/full")
        return save(state, checkpoint_id=checkpoint_id, **among)

    monkeypatch.setattr(checkpoint, "async_save", to_a_full_device)
    with pytest.raises(StorageError, match="a checkpoint did not fit") as caught:
        _run(tmp_path)
    assert caught.value.code == "disk_full"
    assert _names(tmp_path) == ["step-00000003", "step-00000006"]
