"""The clip manifest: a Parquet or CSV file with one row per clip of footage, checked whole before any work is done."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from echovideo.errors import EchoVideoError, RequestError
from echovideo.request import MAX_PROMPT_CHARACTERS, check_text
from pipelines.manifest import ManifestError, Refusal, read_columns, synthetic_id, text_column
from pipelines.photo_reader import UriPolicy, check_uri, resolve_uri
from pipelines.storage import StoragePath, encode_json

VERSION_KEY = b"echovideo.clip_manifest_version"
COLUMNS = (
    text_column("clip_id", "Unique name of the clip: letters, digits, '.', '_', '-', at most 64.", required=True),
    text_column("clip_uri", "The video file: a path (relative to the manifest's folder), file:// or s3://."),
    text_column("caption", "What the person does in it, at most 4000 characters; 226 tokens as published."),
    text_column("person_id", "Who is in it: letters, digits, '.', '_', '-', at most 64."),
    text_column(
        "clip_group", "Clips of one recording share a group, and clips of one file always do; default: its own."
    ),
    text_column("consent_id", "The consent under which the person's face may be learnt."),
)
"""Columns of the clip manifest. `clip_id` must be there; a row without any of the others but the group is refused."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip of footage to learn from; raises RequestError naming the value.

    Codes: `invalid_clip_id`, `no_clip`, `no_caption`, `invalid_caption`, `invalid_person_id`, `invalid_clip_group` and
    `consent_missing`.
    """

    clip_id: str
    clip_uri: str
    caption: str
    person_id: str
    clip_group: str
    consent_id: str

    def __post_init__(self) -> None:
        for name in ("clip_id", "person_id", "clip_group"):
            value = getattr(self, name)
            if not _NAME.fullmatch(value):
                raise RequestError(
                    f"{name} {value!r} must be 1 to 64 letters, digits, '.', '_' or '-', and start with no mark",
                    code=f"invalid_{name}",
                )
        if not self.clip_uri:
            raise RequestError("clip_uri is missing; say where the video file is", code="no_clip")
        if not self.caption.strip():
            raise RequestError("caption is missing; say what the person does in the clip", code="no_caption")
        if len(self.caption) > MAX_PROMPT_CHARACTERS:
            raise RequestError(
                f"caption has {len(self.caption)} characters; at most {MAX_PROMPT_CHARACTERS}", code="invalid_caption"
            )
        if not self.consent_id.strip():
            raise RequestError(
                "consent_id is missing; nobody's face is learnt without a consent on record", code="consent_missing"
            )

    @property
    def row_id(self) -> str:
        """The clip's name in the ledger, which changes with anything its row says: a changed row is new work."""
        return f"{self.clip_id}.{hashlib.sha256(encode_json(asdict(self))).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipManifest:
    """A checked clip manifest: each row is in one of `clips` and `refusals`. `digest` is the SHA-256 of the file."""

    digest: str
    clips: tuple[Clip, ...]
    refusals: tuple[Refusal, ...]


def read_clips(path: StoragePath, policy: UriPolicy) -> ClipManifest:
    """Read and check a clip manifest, as CSV if its name ends so; every bad row is refused by itself, with its reason.

    All rows of one clip_id are refused (`duplicate_clip_id`). Raises ManifestError for the file as a whole,
    StorageError if it cannot be read.
    """
    data = path.read_bytes()
    parquet = _csv_as_parquet(data, path) if path.name.lower().endswith(".csv") else data
    values = read_columns(parquet, path, COLUMNS, VERSION_KEY)
    copies = Counter(values["clip_id"])
    clips: list[Clip] = []
    refusals: list[Refusal] = []
    refused: set[str] = set()
    for index, cells in enumerate(zip(*values.values(), strict=True)):
        row = {name: cell for name, cell in zip(values, cells, strict=True) if cell is not None}
        clip_id = row.get("clip_id", "")
        try:
            if clip_id and copies[clip_id] > 1:
                raise RequestError(f"clip_id {clip_id!r} is on {copies[clip_id]} rows", code="duplicate_clip_id")
            clips.append(_checked(row, path.parent, policy))
        except EchoVideoError as error:
            if not _NAME.fullmatch(clip_id) or clip_id in refused:
                clip_id = synthetic_id(index, copies)
            refused.add(clip_id)
            reason = error.message if len(error.message) <= 1000 else error.message[:1000] + " ..."
            refusals.append(Refusal(row_index=index, row_id=clip_id, code=error.code, message=f"row {index}: {reason}"))
    return ClipManifest(digest=hashlib.sha256(data).hexdigest(), clips=tuple(clips), refusals=tuple(refusals))


def _checked(row: Mapping[str, Any], folder: StoragePath, policy: UriPolicy) -> Clip:
    for name, value in row.items():
        check_text(name, value)
    values = {column.name: row.get(column.name, "") for column in COLUMNS}
    values["clip_group"] = values["clip_group"] or values["clip_id"]
    if values["clip_uri"]:
        values["clip_uri"] = resolve_uri(values["clip_uri"], folder)
    clip = Clip(**values)
    check_uri(clip.clip_uri, policy)
    return clip


def _csv_as_parquet(data: bytes, path: StoragePath) -> bytes:
    """Return a CSV file's bytes as Parquet's, every cell text and an empty one null, so that one reader checks both."""
    options = pa.csv.ConvertOptions(
        column_types={column.name: pa.string() for column in COLUMNS}, strings_can_be_null=True, null_values=[""]
    )
    try:
        found = pa.csv.read_csv(pa.BufferReader(data), convert_options=options)
        buffer = io.BytesIO()
        pq.write_table(found, buffer)
    except pa.ArrowException as error:
        raise ManifestError(f"{path} ({len(data)} bytes) cannot be read as CSV: {error}; write it again") from error
    return buffer.getvalue()
