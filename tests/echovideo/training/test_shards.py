"""Batches from a dataset's folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from echovideo.errors import DatasetError
from echovideo.hashing import normal
from echovideo.training.batch import Stream, TrainingBatch, example_seeds
from echovideo.training.dataset import (
    EXAMPLES_SCHEMA,
    REFERENCES_SCHEMA,
    Dataset,
    Example,
    ExampleTensors,
    NullTensors,
    Reference,
    ReferenceTensors,
    open_dataset,
    pack_null,
    pack_shard,
    table,
)
from echovideo.training.loop import train
from echovideo.training.settings import StageSettings
from echovideo.training.shards import ShardSource
from tests.echovideo.training.small import CONFIG, Kept, make_batch, schedule, settings, small_model
from tests.echovideo.training.test_training_dataset import write_card

SIZES = ((32, 48), (48, 32))
CHOSEN = settings(batch_size=4, references="in_clip", seed=3)


def _write(folder: Path, people: int = 7, clips_each: int = 2) -> Dataset:
    """Write people with clips in turns of two sizes; a clip's tensors are those of the seed of its number."""
    (folder / "shards").mkdir(parents=True)
    examples, references = [], []
    for number in range(people * clips_each):
        height, width = SIZES[number % 2]
        one = make_batch(torch.tensor([number]), 2, height // 8, width // 8)
        other = make_batch(torch.tensor([number]), 2, width // 8, height // 8)
        clip, person = f"clip-{number:02d}", f"person-{number % people}"
        tensors = ExampleTensors(
            latents_mean_FCHW=one.latents_BFCHW[0],
            latents_std_FCHW=one.latents_BFCHW[0].abs(),
            text_ND=one.text_BND[0],
            face_share_FHW=(one.face_share_BFHW[0] * 255).to(torch.uint8),
        )
        face = ReferenceTensors(
            tokens_ND=one.face_tokens_BND[0],
            embedding_D=torch.full((12,), float(number)),
            posteriors={
                (height, width): (one.face_mean_BCHW[0], one.face_std_BCHW[0]),
                (width, height): (other.face_mean_BCHW[0], other.face_std_BCHW[0]),
            },
        )
        data = pack_shard({clip: tensors}, {f"{clip}@0": face})
        sha256 = hashlib.sha256(data).hexdigest()
        where = {
            **{"person_id": person, "clip_id": clip, "clip_group": clip},
            **{"shard": f"{sha256}.safetensors", "shard_sha256": sha256},
        }
        (folder / "shards" / where["shard"]).write_bytes(data)
        shape = {"height": height, "width": width, "num_frames": 5}
        examples.append(Example(example_id=clip, caption="a person", consent_id="c", **shape, **where))
        quality = {"detection_score": 0.9, "face_px": 40.0, "sharpness": 0.2, "yaw_degrees": 0.0}
        references.append(Reference(reference_id=f"{clip}@0", frame_index=0, **quality, **where))
    pq.write_table(table(examples, EXAMPLES_SCHEMA), folder / "examples.parquet")
    pq.write_table(table(references, REFERENCES_SCHEMA), folder / "references.parquet")
    null = NullTensors(text_ND=torch.ones(6, 24), tokens_ND=torch.zeros(5, 16))
    (folder / "null.safetensors").write_bytes(pack_null(null))
    write_card(folder)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Fourteen clips of seven people, seven of each size."""
    return _write(tmp_path_factory.mktemp("shards") / "set")


def _source(dataset: Dataset, chosen: StageSettings = CHOSEN) -> ShardSource:
    return ShardSource(dataset, chosen, CONFIG, scaling_factor=0.7, device="cpu")


def _clips(dataset: Dataset, batch: TrainingBatch) -> list[int]:
    """Return which clips the batch shows, by their captions' states."""
    known = [dataset.example_tensors(example).text_ND for example in dataset.examples]
    return [next(i for i, text in enumerate(known) if torch.equal(text, shown)) for shown in batch.text_BND]


def test_batches_of_an_epoch_take_each_example_once_and_fill_the_last_of_each_size(dataset: Dataset) -> None:
    source = _source(dataset)
    for epoch in range(2):
        batches = [source.batch(4 * epoch + number, 0, 1) for number in range(4)]
        seen = Counter(clip for batch in batches for clip in _clips(dataset, batch))
        assert set(seen) == set(range(14))
        assert sorted(seen.values()) == [1] * 12 + [2] * 2
    orders = [_clips(dataset, source.batch(step, 0, 1)) for step in range(8)]
    assert orders[:4] != orders[4:]


def test_batch_is_of_one_size_and_holds_what_the_shards_hold(dataset: Dataset) -> None:
    source = _source(dataset)
    for step in range(4):
        batch = source.batch(step, 0, 1)
        clips = _clips(dataset, batch)
        assert len({number % 2 for number in clips}) == 1
        seeds = example_seeds(3, step, torch.arange(4))
        assert torch.equal(batch.seed_B, seeds)
        for place, number in enumerate(clips):
            tensors = dataset.example_tensors(dataset.examples[number])
            mean, std = tensors.latents_mean_FCHW.float(), tensors.latents_std_FCHW.float()
            noise = normal(seeds[place : place + 1], mean.numel(), Stream.LATENTS).view(mean.shape)
            assert torch.allclose(batch.latents_BFCHW[place], 0.7 * (mean + std * noise))
            assert torch.allclose(batch.face_share_BFHW[place] * 255, tensors.face_share_FHW.float())
            assert batch.embedding_BD[place].unique().tolist() == [float(number)]


def test_batch_with_cross_clip_references_has_the_persons_other_clip(dataset: Dataset) -> None:
    source = _source(dataset, settings(batch_size=4, references="cross_clip"))
    for step in range(4):
        batch = source.batch(step, 0, 1)
        for number, embedding in zip(_clips(dataset, batch), batch.embedding_BD, strict=True):
            assert int(embedding[0]) == (number + 7) % 14


def test_batches_of_two_processes_are_the_halves_of_ones(dataset: Dataset) -> None:
    whole = _source(dataset).batch(5, 0, 1)
    # A source of its own, that has read nothing before.
    parts = [_source(dataset).batch(5, rank, 2) for rank in range(2)]
    for name in fields(TrainingBatch):
        both = torch.cat([getattr(part, name.name) for part in parts])
        assert torch.equal(both, getattr(whole, name.name)), name.name


def test_train_on_shards_learns(dataset: Dataset) -> None:
    kept, source = Kept(), _source(dataset, settings(references="cross_clip", steps=4))
    train(small_model(), schedule(), source, source.null(), settings(references="cross_clip", steps=4), record=kept)
    assert len(kept.losses) == 4
    assert all(0 < loss < 10 for loss in kept.losses)


def test_source_of_another_models_dataset_is_refused(dataset: Dataset) -> None:
    wider = replace(CONFIG, text_embed_dim=32)
    with pytest.raises(DatasetError, match=r"holds text of \(6, 24\), and the model takes \(6, 32\)"):
        ShardSource(dataset, CHOSEN, wider, scaling_factor=0.7, device="cpu")


def test_source_of_cross_clip_references_with_one_clip_a_person_is_refused(tmp_path: Path) -> None:
    alone = _write(tmp_path / "set", people=2, clips_each=1)
    with pytest.raises(DatasetError, match="person-0, person-1") as caught:
        _source(alone, settings(references="cross_clip"))
    assert caught.value.code == "one_clip"


def test_batch_of_a_shard_that_is_gone_or_cut_names_it(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "set", people=3)
    path = dataset.folder / "shards" / dataset.examples[4].shard
    path.write_bytes(path.read_bytes()[:-5])
    source = _source(dataset)
    with pytest.raises(DatasetError, match=path.name) as caught:
        [source.batch(step, 0, 1) for step in range(2)]
    assert caught.value.code == "shard_damaged"
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path.name} is missing"):
        [source.batch(step, 0, 1) for step in range(2)]
