from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echovideo.errors import RequestError
from echovideo.model.config import TransformerConfig
from echovideo.request import RenderRequest
from pipelines.manifest import (
    SCHEMA,
    VERSION_KEY,
    Defaults,
    Manifest,
    ManifestError,
    read_manifest,
    write_manifest,
)
from pipelines.outcome import Rejected
from pipelines.photo_reader import UriPolicy
from pipelines.storage import StoragePath

TIERS = ("exact", "fast")


def row(row_id: str | None = "a", **values: Any) -> dict[str, Any]:
    return {"row_id": row_id, "prompt": "She smiles.", "photo_uri": "photos/a.jpg", **values}


def write(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> StoragePath:
    names = {name for one in rows for name in one}
    schema = schema or pa.schema([part.with_nullable(True) for part in SCHEMA if part.name in names])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, folder / "manifest.parquet", write_page_checksum=True)
    return StoragePath.parse(str(folder / "manifest.parquet"))


def read(
    path: StoragePath,
    defaults: Defaults | None = None,
    *,
    require_consent: bool = False,
    tiers: tuple[str, ...] = TIERS,
) -> Manifest:
    policy = UriPolicy(roots=(str(path.parent),))
    return read_manifest(path, defaults or Defaults(), policy, tiers, require_consent=require_consent)


def refusals(manifest: Manifest) -> list[tuple[int, str, str]]:
    return [(refusal.row_index, refusal.row_id, refusal.code) for refusal in manifest.refusals]


# Good manifests


def test_manifest_of_the_fewest_columns_gets_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, [row()])
    manifest = read(path)
    assert manifest.requests == (RenderRequest(row_id="a", prompt="She smiles.", photo_uri=f"{tmp_path}/photos/a.jpg"),)
    assert manifest.refusals == ()
    assert manifest.digest == hashlib.sha256((tmp_path / "manifest.parquet").read_bytes()).hexdigest()


def test_manifest_written_reads_back_the_same_requests(root: StoragePath) -> None:
    requests = (
        RenderRequest(
            row_id="everything",
            prompt="\u5979\u7b11\u4e86 \U0001f600",
            photo_bytes=b"\xff\xd8photo",
            negative_prompt="blur",
            seed=2**63 - 1,
            height=256,
            width=128,
            num_frames=17,
            fps=8,
            num_inference_steps=4,
            guidance_scale=1.0,
            guidance_schedule="cosine",
            tier="fast",
            consent_id="c-1",
            face_similarity=0.4,
            tries=3,
            tags={"shot": "12", "\u00fc": ""},
        ),
        RenderRequest(row_id="least", prompt="p", photo_bytes=b"x"),
    )
    write_manifest(requests, root / "m.parquet")
    assert read(root / "m.parquet").requests == requests


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (96, 64, 17)),
        ({"size": "64x32"}, (64, 32, 17)),
        ({"num_frames": 25}, (96, 64, 25)),
        ({"seconds": 0.5}, (96, 64, 9)),
    ],
)
def test_manifest_defaults_of_a_model_stand_in_for_size_and_length_alone(
    given: dict[str, Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    defaults = Defaults(**given).of_model(TransformerConfig(sample_height=8, sample_width=12, sample_frames=17))
    (request,) = read(write(tmp_path, [row("default")]), defaults).requests
    assert (request.width, request.height, request.num_frames) == shape


def test_manifest_defaults_fill_nulls_and_rows_win(tmp_path: Path) -> None:
    defaults = Defaults(size="64x32", seconds=1.0, fps=8, tier="fast", consent_id="batch", tags={"job": "1", "x": "0"})
    rows = [
        row("default"),
        row("own", size="32x64", num_frames=17, fps=16, tier="exact", consent_id="mine", tags=[("x", "1")]),
        row("seconds", seconds=2.0, fps=16),
    ]
    manifest = read(write(tmp_path, rows), defaults, require_consent=True)
    assert [
        (r.width, r.height, r.num_frames, r.fps, r.tier, r.consent_id, dict(r.tags)) for r in manifest.requests
    ] == [
        (64, 32, 9, 8, "fast", "batch", {"job": "1", "x": "0"}),
        (32, 64, 17, 16, "exact", "mine", {"job": "1", "x": "1"}),
        (64, 32, 33, 16, "fast", "batch", {"job": "1", "x": "0"}),
    ]


def test_manifest_from_other_writers_types_is_accepted(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("row_id", pa.large_string()),
            ("prompt", pa.dictionary(pa.int32(), pa.string())),
            ("photo_uri", pa.string_view()),
            ("seed", pa.uint64()),
            ("num_frames", pa.int64()),
            ("guidance_scale", pa.float32()),
            ("seconds", pa.int8()),
            ("tier", pa.null()),
        ]
    )
    rows = [row("a", seed=7, num_frames=17, guidance_scale=2.5), row("b", seconds=1), row("c", seed=2**64 - 1)]
    manifest = read(write(tmp_path, rows, schema))
    assert [(r.row_id, r.seed, r.num_frames, r.guidance_scale) for r in manifest.requests] == [
        ("a", 7, 17, 2.5),
        ("b", 42, 17, 6.0),
    ]
    assert refusals(manifest) == [(2, "c", "invalid_seed")]


# Bad rows


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"prompt": None}, "invalid_prompt"),
        ({"prompt": " \n"}, "invalid_prompt"),
        ({"prompt": "x" * 1_000_000}, "invalid_prompt"),
        ({"photo_uri": None}, "invalid_photo"),
        ({"photo_bytes": b"x"}, "invalid_photo"),
        ({"photo_uri": "../a.jpg"}, "uri_not_allowed"),
        ({"photo_uri": "http://169.254.169.254/latest"}, "uri_not_allowed"),
        ({"photo_uri": "s3://others/a.jpg"}, "uri_not_allowed"),
        ({"size": "100x100"}, "invalid_size"),
        ({"size": "9" * 1_000_000}, "invalid_size"),
        ({"num_frames": 10}, "invalid_num_frames"),
        ({"num_frames": 17, "seconds": 1.0}, "invalid_num_frames"),
        ({"seconds": float("nan")}, "invalid_num_frames"),
        ({"seconds": float("inf")}, "invalid_num_frames"),
        ({"seconds": 60.0}, "invalid_num_frames"),
        ({"guidance_scale": float("nan")}, "invalid_guidance_scale"),
        ({"face_similarity": float("nan")}, "invalid_face_similarity"),
        ({"face_similarity": 1.5}, "invalid_face_similarity"),
        ({"seed": -1}, "invalid_seed"),
        ({"fps": 0}, "invalid_fps"),
        ({"fps": 0, "seconds": 1.0}, "invalid_fps"),
        ({"tries": 0}, "invalid_tries"),
        ({"num_inference_steps": 0}, "invalid_num_inference_steps"),
        ({"guidance_schedule": "none"}, "invalid_guidance_schedule"),
        ({"tier": "best"}, "invalid_tier"),
        ({"tier": "high"}, "tier_unavailable"),
        ({"tags": [("a", None)]}, "invalid_tags"),
    ],
)
def test_manifest_bad_value_refuses_only_its_row(tmp_path: Path, values: dict[str, Any], code: str) -> None:
    manifest = read(write(tmp_path, [row("good"), row("bad", **values), row("last")]))
    assert [request.row_id for request in manifest.requests] == ["good", "last"]
    assert refusals(manifest) == [(1, "bad", code)]
    refusal = manifest.refusals[0]
    assert refusal.message.startswith("row 1: ")
    assert len(refusal.message) < 1100
    assert refusal.outcome() == Rejected(row_id="bad", code=code, message=refusal.message, numbers={"row_index": 1})


def test_manifest_undecodable_text_refuses_only_its_row(tmp_path: Path) -> None:
    prompts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    table = pa.table({"row_id": ["a", "b"], "prompt": prompts, "photo_uri": ["a.jpg", "b.jpg"]})
    pq.write_table(table, tmp_path / "m.parquet")
    manifest = read(StoragePath.parse(str(tmp_path / "m.parquet")))
    assert [request.prompt for request in manifest.requests] == ["ok"]
    assert refusals(manifest) == [(1, "b", "invalid_prompt")]


def test_manifest_consent_is_asked_for_only_when_required(tmp_path: Path) -> None:
    path = write(tmp_path, [row("a", consent_id="c"), row("b", consent_id=""), row("c")])
    assert len(read(path).requests) == 3
    assert refusals(read(path, require_consent=True)) == [(1, "b", "consent_missing"), (2, "c", "consent_missing")]


def test_manifest_every_physical_row_has_one_id_of_its_own(tmp_path: Path) -> None:
    rows = [
        row("twice"),
        row(None),
        row("fine"),
        row("twice", prompt=None),
        row("no spaces"),
        row("no spaces"),
        row("../up"),
        row("row-000001"),
        row("x" * 129),
        row("twice"),
        row(None, prompt=None),
    ]
    manifest = read(write(tmp_path, rows))
    assert [request.row_id for request in manifest.requests] == ["fine", "row-000001"]
    assert refusals(manifest) == [
        (0, "twice", "duplicate_row_id"),
        (1, "row-000001-refused", "invalid_row_id"),
        (3, "row-000003", "duplicate_row_id"),
        (4, "row-000004", "duplicate_row_id"),
        (5, "row-000005", "duplicate_row_id"),
        (6, "row-000006", "invalid_row_id"),
        (8, "row-000008", "invalid_row_id"),
        (9, "row-000009", "duplicate_row_id"),
        (10, "row-000010", "invalid_row_id"),
    ]
    ids = [request.row_id for request in manifest.requests] + [refusal.row_id for refusal in manifest.refusals]
    assert len(ids) == len(set(ids)) == len(rows)


def test_manifest_bad_defaults_are_refused_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a multiple of 16"):
        read(write(tmp_path, [row()]), Defaults(size="100x100"))


# Bad files


def test_manifest_with_wrong_columns_names_all_of_them(tmp_path: Path) -> None:
    table = pa.table({"row_id": [1], "promt": ["x"], "seed": ["7"], "colour": ["red"], "num_frames": [9.0]})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(ManifestError) as caught:
        read(StoragePath.parse(str(tmp_path / "m.parquet")))
    assert caught.value.code == "manifest"
    for words in (
        "required column 'prompt' (string) is missing",
        "neither column 'photo_uri' nor 'photo_bytes' is there",
        "column 'row_id' has type int64, not string",
        "column 'promt' is not known, did you mean 'prompt'?",
        "column 'seed' has type string, not int64",
        "column 'colour' is not known",
        "column 'num_frames' has type double, not int32",
    ):
        assert words in caught.value.message


def test_manifest_of_another_version_is_refused_and_without_one_is_version_1(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()])
    path = StoragePath.parse(str(tmp_path / "m.parquet"))
    for metadata, accepted in (({}, True), ({VERSION_KEY: b"1"}, True), ({VERSION_KEY: b"2"}, False)):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "m.parquet")
        if accepted:
            assert len(read(path).requests) == 1
        else:
            with pytest.raises(ManifestError, match="version 2"):
                read(path)


def test_manifest_cut_anywhere_or_not_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [row("a"), row("b")])
    whole = path.read_bytes()
    for data in (b"", b"PAR1", b"row_id,prompt\n", b"\0" * 5000, *(whole[:end] for end in range(0, len(whole), 97))):
        path.write_bytes(data)
        with pytest.raises(ManifestError, match=r"manifest\.parquet"):
            read(path)


def test_manifest_with_a_flipped_bit_is_refused_or_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, [row(f"r{index}", prompt=f"prompt {index}", seed=index) for index in range(50)])
    whole = path.read_bytes()
    undamaged = read(path)
    refused = 0
    positions = range(0, len(whole), 5)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        try:
            manifest = read(path)
        except ManifestError:
            refused += 1
        else:
            # Statistics and the writer's name may change without harm.
            assert (manifest.requests, manifest.refusals) == (undamaged.requests, undamaged.refusals)
    assert refused > 0.6 * len(positions)


def test_manifest_of_100000_rows_is_read_whole(tmp_path: Path) -> None:
    rows = [row(f"r{index}", photo_uri=f"photos/{index}.jpg", seed=index) for index in range(100_000)]
    path = write(tmp_path, rows)
    manifest = read(path)
    assert [request.seed for request in manifest.requests] == list(range(100_000))
    assert manifest.refusals == ()


def test_schema_every_column_is_in_the_readme() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    assert [name for name in SCHEMA.names if f"`{name}`" not in page] == []
