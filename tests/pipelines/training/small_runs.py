"""What Ray's workers import: small runs, and sources that do them harm."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echovideo.training.batch import TrainingBatch
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import AverageSettings
from pipelines.training.train import Ingredients, TrainingRun
from tests.echovideo.training.small import SmallSource, null_condition, schedule, settings, small_model

SETTINGS = settings(steps=8, checkpoint_every=2, record_every=1, validate_every=4, average=AverageSettings(decay=0.9))


@dataclass(frozen=True)
class KillingSource(SmallSource):
    """Kills one worker, as an operator would, the first time that step 5 comes to it; `folder` remembers."""

    folder: str = ""
    rank: int = 1

    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        marker = Path(self.folder) / f"killed-{rank}"
        if step == 5 and rank == self.rank and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, rank, world_size)


def run(folder: Path, source: SmallSource, **changes: Any) -> TrainingRun:
    """Return a run of eight steps on two workers."""
    values: dict[str, Any] = {"num_workers": 2, "validate": _score} | changes
    return TrainingRun(
        folder=folder,
        settings=SETTINGS,
        ingredients=partial(_ingredients, source, schedule()),
        base_digest="base",
        device="cpu",
        **values,
    )


def _ingredients(source: SmallSource, noise: NoiseSchedule, device: torch.device) -> Ingredients:
    return Ingredients(model=small_model().to(device), schedule=noise, source=source, null=null_condition().to(device))


def _score(model: torch.nn.Module, steps: int) -> dict[str, float]:
    return {"score": float(steps)}
