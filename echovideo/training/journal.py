"""What a run leaves to be looked at: metrics.jsonl, TensorBoard's events, and a picture of the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from echovideo.errors import StorageError
from echovideo.training.loop import ScoreRecord, StepRecord

METRICS, EVENTS, PICTURE = "metrics.jsonl", "tensorboard", "loss.png"
_SMOOTHED = 50


class Journal:
    """Takes a run's records, one process's alone, and writes them into its folder.

    metrics.jsonl has a line for each step, in order, {"step", "loss", "gradient_norm", "learning_rate", "skipped",
    "numbers"}, and for each validation {"steps", "scores"}; a number that is not finite is null. A run that goes on
    from a checkpoint writes the steps after it anew. Raises StorageError for what cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __call__(self, found: StepRecord | ScoreRecord) -> None:
        """Write a record."""
        with _errors(self._folder):
            self._write(found)

    def close(self) -> None:
        """Write what is left and draw the picture, if there was any record."""
        if self._writer is not None:
            with _errors(self._folder):
                self._writer.close()
                draw_losses(self._folder)

    def _write(self, found: StepRecord | ScoreRecord) -> None:
        step = found.step if isinstance(found, StepRecord) else found.steps
        if self._writer is None:
            self._drop_from(step)
            self._writer = SummaryWriter(str(self._folder / EVENTS), purge_step=step, flush_secs=10)
        with (self._folder / METRICS).open("a") as lines:
            lines.write(json.dumps(_finite(asdict(found))) + "\n")
        if isinstance(found, ScoreRecord):
            for name, value in found.scores.items():
                self._writer.add_scalar(f"scores/{name}", value, step)
            return
        values = {"loss": found.loss, "gradient_norm": found.gradient_norm, "learning_rate": found.learning_rate}
        for name, value in (values | dict(found.numbers)).items():
            self._writer.add_scalar(f"training/{name}", value, step)

    def _drop_from(self, step: int) -> None:
        """Leave out what an earlier process wrote of steps that are taken again, and a line it did not finish."""
        path = self._folder / METRICS
        if path.exists():
            kept = [line for line in read_metrics(self._folder) if _place(line) < step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error}); make room or correct it, and start again: the run goes on"
        ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without a last one that its writer did not live to finish."""
    lines = (folder / METRICS).read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def draw_losses(folder: Path) -> Path:
    """Draw a run's losses, and its scores if it has any, into loss.png; return its path."""
    lines = read_metrics(folder)
    steps = [(line["step"], line["loss"]) for line in lines if "step" in line and line["loss"] is not None]
    scores = [(line["steps"], line["scores"]["score"]) for line in lines if "steps" in line]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in steps], [loss for _, loss in steps], color="#9fb7c4", linewidth=0.8, label="loss")
    width = min(_SMOOTHED, len(steps)) or 1
    means = [sum(loss for _, loss in steps[i - width : i]) / width for i in range(width, len(steps) + 1)]
    axes.plot([step for step, _ in steps[width - 1 :]], means, color="#2f6690", label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="velocity error", yscale="log")
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), "o-", color="#c8442b")
        right.set_ylabel("validation score", color="#c8442b")
    axes.legend(frameon=False)
    path = folder / PICTURE
    figure.savefig(path, dpi=150)
    return path


def _place(line: dict[str, Any]) -> int:
    place: int = line["step"] if "step" in line else line["steps"] - 1
    return place


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
