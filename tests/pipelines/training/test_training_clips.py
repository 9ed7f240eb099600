from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest import ManifestError
from pipelines.photo_reader import UriPolicy
from pipelines.storage import StoragePath
from pipelines.training.clips import ClipManifest, read_clips

GOOD = {"clip_id": "a", "clip_uri": "a.mp4", "caption": "A person.", "person_id": "ann", "consent_id": "c-1"}


def read(rows: list[dict[str, str | None]], folder: Path) -> ClipManifest:
    path = folder / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return read_clips(StoragePath.parse(str(path)), UriPolicy(roots=(str(folder),)))


def test_clip_manifest_gives_clips_with_addresses_and_groups(tmp_path: Path) -> None:
    rows = [{**GOOD, "clip_group": None}, {**GOOD, "clip_id": "b", "clip_group": "take-1"}]
    manifest = read(rows, tmp_path)
    assert manifest.refusals == ()
    assert [(clip.clip_id, clip.clip_group) for clip in manifest.clips] == [("a", "a"), ("b", "take-1")]
    assert manifest.clips[0].clip_uri == f"{tmp_path}/a.mp4"


def test_clip_manifest_in_csv_reads_as_the_same_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "clips.csv"
    path.write_text('clip_id,clip_uri,caption,person_id,consent_id\na,a.mp4,"A person, 2 m tall.",007,1\nb,,x,007,1\n')
    manifest = read_clips(StoragePath.parse(str(path)), UriPolicy(roots=(str(tmp_path),)))
    assert [(clip.caption, clip.person_id) for clip in manifest.clips] == [("A person, 2 m tall.", "007")]
    assert [(refusal.row_id, refusal.code) for refusal in manifest.refusals] == [("b", "no_clip")]
    as_parquet = read([{**GOOD, "caption": "A person, 2 m tall.", "person_id": "007", "consent_id": "1"}], tmp_path)
    assert manifest.clips == as_parquet.clips


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"caption": None}, "no_caption", "caption is missing"),
        ({"caption": " "}, "no_caption", "caption is missing"),
        ({"caption": "x" * 4001}, "invalid_caption", "4001 characters"),
        ({"clip_uri": None}, "no_clip", "clip_uri is missing"),
        ({"clip_uri": "/elsewhere/a.mp4"}, "uri_not_allowed", "in no allowed folder"),
        ({"clip_uri": "https://a.example/a.mp4"}, "uri_not_allowed", "not allowed"),
        ({"consent_id": None}, "consent_missing", "consent_id is missing"),
        ({"person_id": "an/n"}, "invalid_person_id", "'an/n'"),
        ({"clip_group": "../x"}, "invalid_clip_group", "'../x'"),
        ({"clip_id": "a b"}, "invalid_clip_id", "'a b'"),
    ],
)
def test_bad_row_is_refused_by_itself_with_row_and_value(
    tmp_path: Path, change: dict[str, str | None], code: str, message: str
) -> None:
    manifest = read([{**GOOD, "clip_id": "good", "clip_group": None}, {**GOOD, **change}], tmp_path)
    assert [clip.clip_id for clip in manifest.clips] == ["good"]
    (refusal,) = manifest.refusals
    assert (refusal.row_index, refusal.code) == (1, code)
    assert refusal.message.startswith("row 1: ")
    assert message in refusal.message


def test_clip_id_on_two_rows_refuses_both(tmp_path: Path) -> None:
    manifest = read([GOOD, GOOD, {**GOOD, "clip_id": "b"}], tmp_path)
    assert [refusal.code for refusal in manifest.refusals] == ["duplicate_clip_id"] * 2
    assert len({refusal.row_id for refusal in manifest.refusals}) == 2
    assert [clip.clip_id for clip in manifest.clips] == ["b"]


def test_row_that_says_something_else_has_another_name_in_the_ledger(tmp_path: Path) -> None:
    first = read([GOOD], tmp_path).clips[0].row_id
    assert read([GOOD], tmp_path).clips[0].row_id == first
    assert read([{**GOOD, "caption": "Another."}], tmp_path).clips[0].row_id != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.parquet", b"PAR1", "cannot be read as Parquet"),
        ("clips.csv", b'clip_id,caption\n"a', "cannot be read as CSV|CSV"),
        ("clips.csv", b"caption\nx\n", "required column 'clip_id'"),
        ("clips.csv", b"clip_id,captoin\na,x\n", "did you mean 'caption'"),
    ],
)
def test_file_that_is_no_clip_manifest_is_refused_as_a_whole(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_clips(StoragePath.parse(str(tmp_path / name)), UriPolicy(roots=(str(tmp_path),)))
