"""Two processes beside one: the same losses, and checkpoints that either takes up from the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from echovideo.errors import TrainingError
from echovideo.training.checkpoint import Checkpoints
from echovideo.training.loop import Trainer, train
from echovideo.training.settings import AverageSettings
from tests.echovideo.training.small import Kept, SmallSource, null_condition, schedule, settings, small_model

AVERAGE = AverageSettings(decay=0.9)
WHOLE = settings(steps=8, average=AVERAGE, checkpoint_every=4, validate_every=8, recomputed_blocks=1)


class _UntilFour(SmallSource):
    """Ends the run after its first checkpoint."""

    def batch(self, step: int, rank: int, world_size: int) -> object:  # type: ignore[override]
        if step == 4:
            raise InterruptedError
        return super().batch(step, rank, world_size)


def _run(folder: Path, *, stops: bool = False) -> list[float]:
    """Train in the folder, on all processes there are, and return the losses of the steps taken."""
    kept, checkpoints = Kept(), Checkpoints(folder, WHOLE, "base")
    source = _UntilFour() if stops else SmallSource()

    def score(model: torch.nn.Module, steps: int) -> dict[str, float]:
        return {"score": float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))}

    try:
        train(
            small_model(),
            schedule(),
            source,  # type: ignore[arg-type]
            null_condition(),
            WHOLE,
            checkpoints=checkpoints,
            record=kept,
            validate=score if not stops else None,
        )
    except InterruptedError:
        checkpoints.wait()
    return kept.losses


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    losses = {"whole": _run(folder / "two"), "stopped": _run(folder / "two_then_one", stops=True)}
    _run(folder / "two_then_two", stops=True)
    losses["two_then_two"] = _run(folder / "two_then_two")
    losses["one_then_two"] = _run(folder / "one_then_two")
    broken = SmallSource(broken=(0,)) if rank else SmallSource()
    kept = Kept()
    train(small_model(), schedule(), broken, null_condition(), settings(steps=2), record=kept)
    if rank == 0:
        torch.save(losses | {"skipped": [found.skipped for found in kept.steps]}, folder / "losses.pt")
    dist.destroy_process_group()


@dataclass(frozen=True)
class _Runs:
    folder: Path
    one: list[float]
    two: dict[str, list[float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> _Runs:
    """One process's run and two processes', with all that they hand to each other."""
    folder = tmp_path_factory.mktemp("parallel")
    one = _run(folder / "one")
    _run(folder / "one_then_two", stops=True)
    mp.spawn(_process, (folder,), nprocs=2)
    return _Runs(folder=folder, one=one, two=torch.load(folder / "losses.pt"))


def test_train_on_two_processes_has_the_losses_of_one(runs: _Runs) -> None:
    assert len(runs.one) == 8
    assert runs.two["whole"] == pytest.approx(runs.one, rel=1e-5)


def test_train_stopped_and_resumed_on_two_processes_has_the_same_losses_to_the_bit(runs: _Runs) -> None:
    assert runs.two["two_then_two"] == runs.two["whole"][4:]


def test_train_resumed_on_another_number_of_processes_has_the_same_losses(runs: _Runs) -> None:
    assert runs.two["stopped"] == runs.two["whole"][:4]
    assert _run(runs.folder / "two_then_one") == pytest.approx(runs.one[4:], rel=1e-5)
    assert runs.two["one_then_two"] == pytest.approx(runs.one[4:], rel=1e-5)


def test_validation_on_two_processes_sees_the_averaged_weights_whole(runs: _Runs) -> None:
    def score(name: str) -> float:
        checkpoints = Checkpoints(runs.folder / name, WHOLE, "base")
        model = small_model()
        progress = checkpoints.restore(Trainer(model, schedule(), null_condition(), WHOLE).optimizer)
        return progress.scores["score"]

    assert score("two") == pytest.approx(score("one"), rel=1e-6)


def test_step_that_is_broken_on_one_process_is_skipped_on_all(runs: _Runs) -> None:
    assert runs.two["skipped"] == [True, False]


def test_train_with_more_recomputed_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(TrainingError, match="recomputed_blocks is 3, and the model has 2"):
        train(small_model(), schedule(), SmallSource(), null_condition(), settings(recomputed_blocks=3))
