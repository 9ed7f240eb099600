"""Says on stderr how a training of a small part goes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from torch import Tensor

from echovideo.training.settings import GROUPS, AverageSettings, StageSettings

THOUSANDTHS = 1000
_SECONDS = 10.0


@dataclass(kw_only=True, slots=True)
class Progress:
    """Counts a training's steps against its time, and reports them every few seconds.

    A small part is trained for a time and not for a number of steps: a slower machine gets further behind, not later.
    """

    name: str
    seconds: float
    steps: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _reported: float = field(default_factory=time.perf_counter)

    @property
    def share(self) -> float:
        """How much of the time is over, from 0."""
        return (time.perf_counter() - self._started) / self.seconds

    def stepped(self, **numbers: Tensor) -> None:
        """Count a step; if the last report is some seconds old, report it. Only then its numbers leave the device."""
        self.steps += 1
        now = time.perf_counter()
        if now - self._reported < _SECONDS and self.share < 1:
            return
        self._reported = now
        said = ", ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        pace = self.steps / (now - self._started)
        print(
            f"{self.name}: {self.share:.0%}, {self.steps} steps, {pace:.2f} a second, {said}",
            file=sys.stderr,
            flush=True,
        )


def timed_settings(name: str, batch_size: int, learning_rate: float, decay: float) -> StageSettings:
    """Return what the optimizer is told: its step is the share of the time in thousandths, warmed up and annealed."""
    return StageSettings(
        name=name,
        steps=THOUSANDTHS,
        batch_size=batch_size,
        groups=GROUPS,
        learning_rate=learning_rate,
        warmup_steps=THOUSANDTHS // 20,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        average=AverageSettings(decay=decay),
    )
