from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from echovideo.errors import DatasetError
from echovideo.training.dataset import (
    EXAMPLES_SCHEMA,
    REFERENCES_SCHEMA,
    DatasetCard,
    Example,
    ExampleTensors,
    NullTensors,
    Reference,
    ReferenceTensors,
    making_digest,
    open_dataset,
    pack_null,
    pack_shard,
    table,
)

SIZE = (96, 96)


def example_tensors(seed: int) -> ExampleTensors:
    generator = torch.Generator().manual_seed(seed)
    return ExampleTensors(
        latents_mean_FCHW=torch.randn(5, 16, 12, 12, generator=generator).bfloat16(),
        latents_std_FCHW=torch.rand(5, 16, 12, 12, generator=generator).bfloat16(),
        text_ND=torch.randn(226, 8, generator=generator).bfloat16(),
        face_share_FHW=torch.randint(0, 256, (5, 12, 12), generator=generator, dtype=torch.uint8),
    )


def reference_tensors(seed: int) -> ReferenceTensors:
    generator = torch.Generator().manual_seed(100 + seed)
    return ReferenceTensors(
        tokens_ND=torch.randn(196, 8, generator=generator).bfloat16(),
        embedding_D=torch.randn(128, generator=generator),
        posteriors={SIZE: (torch.randn(16, 12, 12).bfloat16(), torch.rand(16, 12, 12).bfloat16())},
    )


def write_dataset(folder: Path, clips: list[tuple[str, str]]) -> None:
    """Write a dataset of (person, clip group), one clip each, named clip-0, clip-1 and so on."""
    (folder / "shards").mkdir(parents=True)
    examples, references = [], []
    for number, (person, group) in enumerate(clips):
        clip, reference_id = f"clip-{number}", f"clip-{number}@3"
        data = pack_shard({clip: example_tensors(number)}, {reference_id: reference_tensors(number)})
        sha256 = hashlib.sha256(data).hexdigest()
        where = {
            **{"person_id": person, "clip_id": clip, "clip_group": group},
            **{"shard": f"{sha256}.safetensors", "shard_sha256": sha256},
        }
        (folder / "shards" / where["shard"]).write_bytes(data)
        shape = {"height": 96, "width": 96, "num_frames": 17}
        examples.append(Example(example_id=clip, caption=f"says {number}", consent_id="c", **shape, **where))
        quality = {"detection_score": 0.9, "face_px": 40.5, "sharpness": 0.2, "yaw_degrees": -3.0}
        references.append(Reference(reference_id=reference_id, frame_index=3, **quality, **where))
    pq.write_table(table(examples, EXAMPLES_SCHEMA), folder / "examples.parquet")
    pq.write_table(table(references, REFERENCES_SCHEMA), folder / "references.parquet")
    (folder / "null.safetensors").write_bytes(
        pack_null(NullTensors(text_ND=torch.ones(226, 8), tokens_ND=torch.ones(196, 8)))
    )
    write_card(folder)


def write_card(folder: Path, **changes: object) -> None:
    making = {"model": "tiny", "settings": {"stride": 1}}
    names = ("examples.parquet", "references.parquet", "null.safetensors")
    card = DatasetCard(
        digest=making_digest(making),
        licence="none",
        making=making,
        buckets={"96x96x17": {"count": 2}},
        files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    )
    (folder / "dataset.json").write_text(json.dumps({**asdict(card), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", [("ann", "a"), ("ann", "b"), ("bob", "c")])
    return tmp_path / "set"


def test_dataset_gives_back_rows_and_tensors_bit_for_bit(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert [(item.example_id, item.caption, item.bucket) for item in dataset.examples] == [
        (f"clip-{number}", f"says {number}", "96x96x17") for number in range(3)
    ]
    written, read = example_tensors(1), dataset.example_tensors(dataset.examples[1])
    for name in ("latents_mean_FCHW", "latents_std_FCHW", "text_ND", "face_share_FHW"):
        assert getattr(read, name).dtype == getattr(written, name).dtype
        assert torch.equal(getattr(read, name), getattr(written, name))
    face = dataset.reference_tensors(dataset.references[1], *SIZE)
    assert torch.equal(face.tokens_ND, reference_tensors(1).tokens_ND)
    assert torch.equal(face.embedding_D, reference_tensors(1).embedding_D)
    assert face.posteriors[SIZE][0].shape == (16, 12, 12)
    assert torch.equal(dataset.null().text_ND, torch.ones(226, 8).bfloat16())


def test_shard_of_equal_tensors_has_equal_bytes() -> None:
    made = [
        pack_shard({"b": example_tensors(1), "a": example_tensors(2)}, {}),
        pack_shard({"a": example_tensors(2), "b": example_tensors(1)}, {}),
    ]
    assert made[0] == made[1]


def test_references_in_clip_are_the_clips_own_and_cross_clip_are_of_another_group(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert [item.clip_id for item in dataset.in_clip(dataset.examples[0])] == ["clip-0"]
    assert [item.clip_id for item in dataset.cross_clip(dataset.examples[0])] == ["clip-1"]


def test_cross_clip_of_a_person_with_one_clip_is_refused_by_name(folder: Path) -> None:
    dataset = open_dataset(folder)
    with pytest.raises(DatasetError, match=r"there is one of bob\. Add clips") as caught:
        dataset.check_cross_clip()
    assert caught.value.code == "one_clip"
    with pytest.raises(DatasetError, match="bob"):
        dataset.cross_clip(dataset.examples[2])


def test_cross_clip_of_two_clips_of_one_group_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [("ann", "same"), ("ann", "same")])
    with pytest.raises(DatasetError, match="ann"):
        open_dataset(tmp_path / "set").check_cross_clip()


def shard(folder: Path) -> Path:
    return folder / "shards" / open_dataset(folder).examples[0].shard


def read_first(folder: Path) -> None:
    dataset = open_dataset(folder)
    dataset.example_tensors(dataset.examples[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_columns(folder: Path) -> None:
    pq.write_table(pa.table({"example_id": ["a"]}), folder / "examples.parquet")
    write_card(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no_card": (lambda at: (at / "dataset.json").unlink(), "dataset_missing", "dataset.json is missing"),
    "cut_card": (lambda at: cut(at / "dataset.json"), "dataset_damaged", "is not JSON"),
    "newer": (lambda at: write_card(at, schema=2), "dataset_schema", "has schema 2; this release reads 1"),
    "forged": (lambda at: write_card(at, digest="0" * 64), "dataset_damaged", "digest is not that"),
    "no_table": (lambda at: (at / "references.parquet").unlink(), "dataset_missing", "references.parquet is missing"),
    "cut_table": (lambda at: cut(at / "examples.parquet"), "dataset_damaged", "cut short or damaged"),
    "columns": (other_columns, "dataset_schema", "other columns"),
    "cut_null": (lambda at: cut(at / "null.safetensors"), "dataset_damaged", "null.safetensors"),
    "no_shard": (lambda at: shard(at).unlink(), "shard_missing", "safetensors is missing"),
    "cut_shard": (lambda at: cut(shard(at)), "shard_damaged", "cut short or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_dataset_is_refused_with_the_file_and_what_to_do(folder: Path, damage: str) -> None:
    harm, code, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        read_first(folder)
    assert caught.value.code == code
    assert str(folder) in caught.value.message


def test_reference_asked_for_at_a_size_that_was_not_made_is_refused(folder: Path) -> None:
    dataset = open_dataset(folder)
    with pytest.raises(DatasetError, match="480x848"):
        dataset.reference_tensors(dataset.references[0], 480, 848)


def test_example_whose_clip_has_no_reference_is_refused(folder: Path) -> None:
    references = [replace(item, clip_id="other") for item in open_dataset(folder).references]
    pq.write_table(table(references, REFERENCES_SCHEMA), folder / "references.parquet")
    write_card(folder)
    with pytest.raises(DatasetError, match="no reference of clip 'clip-0'"):
        open_dataset(folder)
