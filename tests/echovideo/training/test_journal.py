"""A run's metrics, as lines, as TensorBoard's events and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echovideo.errors import StorageError
from echovideo.training.journal import Journal, draw_losses, read_metrics
from echovideo.training.loop import ScoreRecord, StepRecord


def _step(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, gradient_norm=1.0, learning_rate=1e-3, skipped=not math.isfinite(loss), numbers={"e": 2.0}
    )


def test_journal_of_a_run_that_goes_on_holds_each_step_once_and_in_order(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    for found in (_step(0), _step(1), ScoreRecord(steps=2, scores={"score": 0.4}), _step(2), _step(3)):
        first(found)
    first(ScoreRecord(steps=4, scores={"score": 0.6}))
    # Its process died within a line.
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')
    second = Journal(tmp_path)
    second(_step(2, loss=0.25))
    second(_step(3, loss=math.nan))
    second(ScoreRecord(steps=4, scores={"score": 0.7}))
    second.close()
    found = read_metrics(tmp_path)
    assert [line.get("step", "score") for line in found] == [0, 1, "score", 2, 3, "score"]
    assert [line["loss"] for line in found if "loss" in line] == [0.5, 0.5, 0.25, None]
    assert found[2] == {"steps": 2, "scores": {"score": 0.4}}
    assert found[0] == {
        **{"step": 0, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "skipped": False},
        "numbers": {"e": 2.0},
    }
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for name in (b"training/loss", b"training/gradient_norm", b"training/e", b"scores/score"):
        assert name in events


def test_journal_that_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal(_step(0))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be written"):
        journal(_step(1))
    with pytest.raises(StorageError, match="make room"):
        journal.close()


def test_draw_losses_shows_a_curve_that_falls(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(200):
        journal(_step(step, loss=math.exp(-step / 50)))
    journal.close()
    pixels = np.asarray(Image.open(draw_losses(tmp_path)).convert("RGB")).astype(int)
    dark_blue = np.argwhere((abs(pixels - (0x2F, 0x66, 0x90)) < 20).all(axis=-1))
    columns = dark_blue[:, 1]
    early = dark_blue[columns < np.quantile(columns, 0.1), 0]
    late = dark_blue[(columns > np.quantile(columns, 0.45)) & (columns < np.quantile(columns, 0.55)), 0]
    assert np.median(late) > np.median(early) + 50


def test_draw_losses_of_a_run_without_a_finite_loss_is_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal(_step(0, loss=math.nan))
    journal.close()
    assert (tmp_path / "loss.png").stat().st_size > 1000
