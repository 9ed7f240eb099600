"""The driver of a training run: Ray Train's workers around the loop, retries after one dies, and the run's folder.

run/checkpoints/    the checkpoints that a run goes on from
run/metrics.jsonl, run/tensorboard/, run/loss.png
run/ray/            Ray's own notes
run/lock            held while somebody trains here
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from echovideo.errors import EchoVideoError, TrainingError
from echovideo.model.config import read_config
from echovideo.model.folder import load_scheduler, load_transformer
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.batch import ExampleSource, NullCondition
from echovideo.training.checkpoint import Checkpoints, Progress, read_progress
from echovideo.training.dataset import open_dataset
from echovideo.training.journal import Journal
from echovideo.training.loop import Validate, train
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import StageSettings
from echovideo.training.shards import ShardSource

_REFUSED = "refused.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ingredients:
    """What a worker trains and on what, all on its device."""

    model: EchoVideoTransformer3DModel
    schedule: NoiseSchedule
    source: ExampleSource
    null: NullCondition


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingRun:
    """A run: its folder, its settings, and how a worker makes what it trains. Workers get it pickled.

    `ingredients` is called on each worker with its device, and gives the same weights on all. `base_digest` names these
    weights. Without workers, `num_workers` 0, the run takes place in this process, on one device. `max_failures` is how
    many deaths of workers a run survives. Folders are reached by all machines of the run under one path.
    """

    folder: Path
    settings: StageSettings
    ingredients: Callable[[torch.device], Ingredients]
    base_digest: str
    device: Literal["cpu", "cuda"]
    num_workers: int = 0
    validate: Validate | None = None
    max_failures: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """How a run went, and its best checkpoint by validation, or else the last."""

    progress: Progress
    best: Path


def dataset_ingredients(model: Path, dataset: Path, settings: StageSettings, device: torch.device) -> Ingredients:
    """Return the model of a folder, in bfloat16 on a GPU and float32 elsewhere, and a dataset of shards to train it on.

    Raises WeightsError or DatasetError.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = load_transformer(model, dtype=dtype).to(device)
    scaling_factor = float(read_config(model / "vae")["scaling_factor"])
    source = ShardSource(
        open_dataset(dataset), settings, transformer.config, scaling_factor=scaling_factor, device=device
    )
    return Ingredients(
        model=transformer,
        schedule=NoiseSchedule.of(load_scheduler(model), scaling_factor, device),
        source=source,
        null=source.null(),
    )


def run_training(run: TrainingRun) -> TrainingResult:
    """Train to the end, from the run's last good checkpoint on if it has one, and return the result.

    A worker that dies is replaced, all workers begin again from the last good checkpoint, and so at most `max_failures`
    times. Raises TrainingError, code "workers", beyond that, and "already_running" while another process trains in the
    run's folder; errors that a person has to act on end the run at once.
    """
    folder = run.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process trains in {folder}; wait for it, or stop it first", code="already_running"
            ) from None
        return _run_workers(run, folder)


def _run_workers(run: TrainingRun, folder: Path) -> TrainingResult:
    refused = folder / _REFUSED
    refused.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": run, "folder": folder},
        scaling_config=ScalingConfig(num_workers=run.num_workers, use_gpu=run.device == "cuda" and run.num_workers > 0),
        run_config=RunConfig(
            name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=run.max_failures)
        ),
    )
    failure = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    if refused.exists():
        raise TrainingError(**json.loads(refused.read_text()))
    if failure is not None:
        raise TrainingError(
            f"workers of the run in {folder} died {run.max_failures + 1} times: {failure}. Started again, the run "
            "goes on from its last good checkpoint",
            code="workers",
        ) from failure
    checkpoints = Checkpoints(folder / "checkpoints", run.settings, run.base_digest)
    best, last = checkpoints.best(), checkpoints.last()
    assert best is not None
    assert last is not None
    shutil.rmtree(folder / "ray", ignore_errors=True)
    return TrainingResult(progress=read_progress(last), best=best)


def _work(config: dict[Any, Any]) -> None:
    """Train on one worker; an error that no retry mends is left in the run's folder, and ends the next attempt."""
    run, folder = config["run"], config["folder"]
    refused = folder / _REFUSED
    if refused.exists():
        return
    try:
        _train(run, folder)
    except EchoVideoError as error:
        if run.num_workers:
            refused.write_text(json.dumps({"message": error.message, "code": error.code}))
        raise


def _train(run: TrainingRun, folder: Path) -> None:
    device = torch.device(run.device)
    if device.type == "cuda":
        device = ray.train.torch.get_device() if run.num_workers else torch.device("cuda", torch.cuda.current_device())
    made = run.ingredients(device)
    journal = Journal(folder)
    try:
        train(
            made.model,
            made.schedule,
            made.source,
            made.null,
            run.settings,
            checkpoints=Checkpoints(folder / "checkpoints", run.settings, run.base_digest),
            record=journal,
            validate=run.validate,
        )
    finally:
        journal.close()
