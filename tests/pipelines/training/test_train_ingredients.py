"""A worker's ingredients from a model folder and a dataset."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from echovideo.errors import DatasetError
from echovideo.model.folder import save_transformer
from echovideo.tiny.parts import scheduler
from echovideo.training.journal import read_metrics
from pipelines.training.train import TrainingRun, dataset_ingredients, run_training
from tests.echovideo.training.small import settings, small_model
from tests.echovideo.training.test_shards import write_people

CHOSEN = settings(steps=3, references="cross_clip")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with what training reads of it."""
    folder = tmp_path / "model"
    save_transformer(small_model(), folder)
    scheduler().save_pretrained(folder / "scheduler")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"scaling_factor": 0.7}')
    return folder


def _run(tmp_path: Path, model: Path) -> TrainingRun:
    return TrainingRun(
        folder=tmp_path / "run",
        settings=CHOSEN,
        ingredients=partial(dataset_ingredients, model, tmp_path / "set", CHOSEN),
        base_digest="base",
        device="cpu",
    )


def test_run_on_a_dataset_in_this_process_trains_the_folders_model(tmp_path: Path, model: Path) -> None:
    write_people(tmp_path / "set", people=4)
    made = dataset_ingredients(model, tmp_path / "set", CHOSEN, torch.device("cpu"))
    assert made.model.proj_out.weight.dtype == torch.float32
    assert made.schedule.scaling_factor == 0.7
    result = run_training(_run(tmp_path, model))
    assert result.progress.steps == 3
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 3
    assert result.progress.loss == losses[-1]


def test_run_on_a_dataset_with_a_shard_gone_ends_with_the_shards_name(tmp_path: Path, model: Path) -> None:
    dataset = write_people(tmp_path / "set", people=4)
    for example in dataset.examples[1:]:
        (dataset.folder / "shards" / example.shard).unlink()
    with pytest.raises(DatasetError, match="is missing") as caught:
        run_training(_run(tmp_path, model))
    assert caught.value.code == "shard_missing"
