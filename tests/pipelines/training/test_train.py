"""Training by Ray's workers: one that is killed does not show in the losses."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from echovideo.errors import TrainingError
from echovideo.training.journal import read_metrics
from pipelines.training.train import run_training
from tests.echovideo.training.small import SmallSource
from tests.pipelines.training.small_runs import KillingSource, run

pytestmark = pytest.mark.usefixtures("ray_of_two_cpus")


def test_run_with_a_worker_killed_goes_on_to_the_same_losses_to_the_bit(tmp_path: Path) -> None:
    whole = run_training(run(tmp_path / "whole", SmallSource()))
    folder = tmp_path / "run"
    result = run_training(run(folder, KillingSource(folder=str(tmp_path))))
    assert len(list(tmp_path.glob("killed-*"))) == 1
    assert result.progress == whole.progress
    assert (result.progress.steps, result.best.name) == (8, "step-00000008")
    lines = read_metrics(folder)
    assert lines == read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "step" in line] == list(range(8))
    assert [line["steps"] for line in lines if "steps" in line] == [4, 8]
    assert (folder / "loss.png").stat().st_size > 5000
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_run_whose_worker_dies_too_often_ends_and_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    source = KillingSource(folder=str(tmp_path), rank=0)
    with pytest.raises(TrainingError, match="died 1 times") as caught:
        run_training(run(tmp_path / "run", source, num_workers=1, max_failures=0))
    assert caught.value.code == "workers"
    assert run_training(run(tmp_path / "run", source, num_workers=0)).progress.steps == 8
    run_training(run(tmp_path / "whole", SmallSource(), num_workers=0))
    losses, others = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "step" in line] for name in ("run", "whole")
    )
    assert losses == pytest.approx(others, rel=1e-5)


def test_run_that_another_process_trains_is_refused_and_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TrainingError) as caught:
            run_training(run(tmp_path, SmallSource()))
    assert caught.value.code == "already_running"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_run_with_an_error_for_a_person_ends_with_it_and_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="steps 3 to 5 gave no finite loss") as caught:
        run_training(run(tmp_path, SmallSource(broken=(3, 4, 5)), num_workers=1))
    assert caught.value.code == "not_finite"
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000004'}" in caught.value.message
