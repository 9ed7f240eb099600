"""The manifest: a versioned Parquet file with one row per video, checked whole before any work is done."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from echovideo.errors import EchoVideoError, RequestError, RunError
from echovideo.model.config import TransformerConfig
from echovideo.request import (
    DEFAULT_FPS,
    DEFAULT_GUIDANCE,
    DEFAULT_SEED,
    DEFAULT_STEPS,
    MAX_FRAMES,
    SIZES,
    GuidanceSchedule,
    RenderRequest,
    Tier,
    check_text,
    frames_for_seconds,
    parse_size,
)
from pipelines.outcome import Rejected
from pipelines.photo_reader import UriPolicy, check_uri, resolve_uri
from pipelines.storage import StoragePath

MANIFEST_VERSION = 1
"""Version of the schema below, in the file's key-value metadata under VERSION_KEY; a file without it is version 1."""
VERSION_KEY = b"echovideo.manifest_version"
_PUBLISHED = TransformerConfig()


class ManifestError(RunError):
    """The file as a whole cannot be a manifest: not Parquet, of another version, or with wrong columns."""

    code = "manifest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the manifest; `accepts` tells which Arrow types may stand for `type`."""

    name: str
    type: pa.DataType
    required: bool
    meaning: str
    accepts: Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind))


def _is_text_map(kind: pa.DataType) -> bool:
    return bool(types.is_map(kind)) and _is_text(kind.key_type) and _is_text(kind.item_type)


def text_column(name: str, meaning: str, *, required: bool = False) -> Column:
    """Return a column of text."""
    return Column(name=name, type=pa.string(), required=required, meaning=meaning, accepts=_is_text)


def _integer(name: str, type: pa.DataType, meaning: str) -> Column:
    return Column(name=name, type=type, required=False, meaning=meaning, accepts=types.is_integer)


def _number(name: str, meaning: str) -> Column:
    return Column(name=name, type=pa.float64(), required=False, meaning=meaning, accepts=_is_number)


COLUMNS = (
    text_column("row_id", "Unique name of the row: letters, digits, '.', '_', '-', at most 128.", required=True),
    text_column(
        "prompt",
        "What the person does, at most 4000 characters; the published model reads 226 tokens.",
        required=True,
    ),
    text_column("photo_uri", "The photo: a path (relative to the manifest's folder), file://, s3:// or https://."),
    Column(
        name="photo_bytes",
        type=pa.binary(),
        required=False,
        meaning="The photo itself, as JPEG, PNG or WebP. Each row has exactly one of photo_uri and photo_bytes.",
        accepts=_is_binary,
    ),
    text_column("negative_prompt", "What to steer away from; default empty."),
    _integer("seed", pa.int64(), f"Seed of the noise, 0 to 2^63-1; default {DEFAULT_SEED}."),
    text_column(
        "size",
        f"WIDTHxHEIGHT in pixels, multiples of 16, or one of {', '.join(SIZES)}; default as the model was trained.",
    ),
    _integer("num_frames", pa.int32(), f"Frames: 8k+1, 9 to {MAX_FRAMES}; default as the model was trained."),
    _number("seconds", "Length instead of num_frames, rounded to the nearest allowed number of frames."),
    _integer("fps", pa.int32(), f"Frames per second, 1 to 60; default {DEFAULT_FPS}."),
    _integer("num_inference_steps", pa.int32(), f"Denoising steps, 1 to 1000; default {DEFAULT_STEPS}."),
    _number("guidance_scale", f"Classifier-free guidance, 1 to 30; default {DEFAULT_GUIDANCE:g}."),
    text_column("guidance_schedule", "published, constant or cosine; default published."),
    text_column("tier", "Quality tier: exact, high or fast; default exact."),
    text_column("consent_id", "The consent under which the person may be shown."),
    text_column("identity_lora", "Name of a registered identity to render with; it asks for its own consent_id."),
    _number("face_similarity", "Cosine similarity to the photo that the video must reach, -1 to 1; default no gate."),
    _integer("tries", pa.int32(), "Seeds that may be spent on reaching face_similarity, 1 to 16; default 1."),
    Column(
        name="tags",
        type=pa.map_(pa.string(), pa.string()),
        required=False,
        meaning="Free key-value pairs, passed through to the results.",
        accepts=_is_text_map,
    ),
)
SCHEMA = pa.schema(
    [
        pa.field(column.name, column.type, nullable=not column.required, metadata={"doc": column.meaning})
        for column in COLUMNS
    ],
    metadata={VERSION_KEY: str(MANIFEST_VERSION).encode()},
)
"""The schema that `write_manifest` writes and `read_manifest` reads; column order does not matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a row gets for each optional column it leaves out or null. `num_frames` and `seconds` are not both set.

    No size and no length stand for the published model's.
    """

    negative_prompt: str = ""
    seed: int = DEFAULT_SEED
    size: str | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: int = DEFAULT_FPS
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    guidance_schedule: GuidanceSchedule = "published"
    tier: Tier = "exact"
    consent_id: str | None = None
    face_similarity: float | None = None
    tries: int = 1
    tags: Mapping[str, str] = field(default_factory=dict)

    def of_model(self, trained: TransformerConfig) -> Defaults:
        """Return them with the size and length that a model was trained on, where none were given."""
        given = self.num_frames is not None or self.seconds is not None
        return replace(
            self,
            size=trained.default_size if self.size is None else self.size,
            num_frames=self.num_frames if given else trained.sample_frames,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One row that will not be rendered; `row_index` counts from 0 in the file.

    `row_id` is the row's own where it has a usable one that no earlier row has, else "row-" and the six-digit index.
    """

    row_index: int
    row_id: str
    code: str
    message: str

    def outcome(self) -> Rejected:
        """Return the row's final outcome."""
        return Rejected(row_id=self.row_id, code=self.code, message=self.message, numbers={"row_index": self.row_index})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A checked manifest. Each physical row is in exactly one of `requests` and `refusals`, under a row_id of its own.

    `digest` is the SHA-256 of the file's bytes, in hex.
    """

    digest: str
    requests: tuple[RenderRequest, ...]
    refusals: tuple[Refusal, ...]


def read_manifest(
    path: StoragePath,
    defaults: Defaults,
    policy: UriPolicy,
    tiers_available: Collection[str],
    *,
    require_consent: bool,
    check: Callable[[RenderRequest], object] = lambda request: None,
) -> Manifest:
    """Read and check a manifest; every bad row is refused by itself, with its reason.

    When several rows have one row_id, all of them are refused (`duplicate_row_id`): which one was meant is not ours to
    guess. A tier outside `tiers_available` is `tier_unavailable`, a missing consent `consent_missing`.
    `check` raises an EchoVideoError for a request that is refused for another reason.
    Raises ManifestError for the file as a whole, RequestError for bad `defaults`, StorageError if it cannot be read.
    """
    _request({"row_id": "defaults", "prompt": "defaults", "photo_bytes": b""}, defaults)
    data = path.read_bytes()
    values = read_columns(data, path, COLUMNS, VERSION_KEY, _check_photo_columns)
    copies = Counter(values["row_id"])
    refused_ids: set[str] = set()
    requests: list[RenderRequest] = []
    refusals: list[Refusal] = []
    for index, cells in enumerate(zip(*values.values(), strict=True)):
        row = {name: cell for name, cell in zip(values, cells, strict=True) if cell is not None}
        row_id = row.get("row_id")
        try:
            if copies[row_id] > 1 and row_id is not None:
                raise RequestError(f"row_id {row_id!r} is on {copies[row_id]} rows", code="duplicate_row_id")
            request = _checked_request(row, defaults, path.parent, policy, tiers_available, require_consent)
            check(request)
            requests.append(request)
        except EchoVideoError as error:
            if row_id is None or not _is_row_id(row_id) or row_id in refused_ids:
                row_id = synthetic_id(index, copies)
            refused_ids.add(row_id)
            # The message quotes the value, which may be a megabyte of text.
            reason = error.message if len(error.message) <= 1000 else error.message[:1000] + " ..."
            refusals.append(Refusal(row_index=index, row_id=row_id, code=error.code, message=f"row {index}: {reason}"))
    return Manifest(digest=hashlib.sha256(data).hexdigest(), requests=tuple(requests), refusals=tuple(refusals))


def write_manifest(requests: Sequence[RenderRequest], path: StoragePath) -> None:
    """Write requests as a manifest that reads back as the same requests."""
    rows = [
        {
            **{name: getattr(request, name) for name in _SHARED_FIELDS},
            "size": f"{request.width}x{request.height}",
            "tags": list(request.tags.items()),
        }
        for request in requests
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, write_page_checksum=True)
    path.write_bytes(buffer.getvalue())


_SHARED_FIELDS = tuple(
    name for name in SCHEMA.names if name in {item.name for item in fields(RenderRequest)} and name != "tags"
)
_DIRECT_FIELDS = tuple(name for name in _SHARED_FIELDS if name not in ("row_id", "prompt", "num_frames"))


def _checked_request(
    row: dict[str, Any],
    defaults: Defaults,
    folder: StoragePath,
    policy: UriPolicy,
    tiers_available: Collection[str],
    require_consent: bool,
) -> RenderRequest:
    for name, value in row.items():
        if isinstance(value, str):
            check_text(name, value)
    if "photo_uri" in row:
        row["photo_uri"] = resolve_uri(row["photo_uri"], folder)
    request = _request(row, defaults)
    if request.photo_uri is not None:
        check_uri(request.photo_uri, policy)
    if request.tier not in tiers_available:
        raise RequestError(
            f"tier {request.tier!r} is not to be had here; available: {', '.join(sorted(tiers_available))}",
            code="tier_unavailable",
        )
    if require_consent and not request.consent_id:
        raise RequestError("consent_id is missing, and this run asks for one in every row", code="consent_missing")
    return request


def _request(row: dict[str, Any], defaults: Defaults) -> RenderRequest:
    if "row_id" not in row:
        raise RequestError("row_id is missing", code="invalid_row_id")
    if "prompt" not in row:
        raise RequestError("prompt is missing; say what the person does", code="invalid_prompt")
    values: dict[str, Any] = {name: row.get(name, getattr(defaults, name, None)) for name in _DIRECT_FIELDS}
    height, width = parse_size(row.get("size", _PUBLISHED.default_size if defaults.size is None else defaults.size))
    tags = dict(row.get("tags", ()))
    for name, value in tags.items():
        if value is None:
            raise RequestError(f"tag {name!r} has no value", code="invalid_tags")
    return RenderRequest(
        row_id=row["row_id"],
        prompt=row["prompt"],
        height=height,
        width=width,
        num_frames=_num_frames(row, defaults, values["fps"]),
        tags={**defaults.tags, **tags},
        **values,
    )


def _num_frames(row: dict[str, Any], defaults: Defaults, fps: int) -> int:
    if "num_frames" not in row and "seconds" not in row:
        row = {"num_frames": defaults.num_frames, "seconds": defaults.seconds}
    num_frames, seconds = row.get("num_frames"), row.get("seconds")
    if num_frames is not None and seconds is not None:
        raise RequestError("give num_frames or seconds, not both", code="invalid_num_frames")
    if seconds is not None:
        return frames_for_seconds(seconds, fps)
    return _PUBLISHED.sample_frames if num_frames is None else num_frames


def _is_row_id(row_id: str) -> bool:
    try:
        RenderRequest(row_id=row_id, prompt="any", photo_bytes=b"")
    except RequestError:
        return False
    return True


def synthetic_id(index: int, taken: Collection[str | None]) -> str:
    """Return a name for row `index`, which has no usable one, that is not `taken`."""
    row_id = f"row-{index:06d}"
    while row_id in taken:
        row_id += "-refused"
    return row_id


def _check_photo_columns(names: Collection[str]) -> list[str]:
    there = {"photo_uri", "photo_bytes"} & set(names)
    return [] if there else ["neither column 'photo_uri' nor 'photo_bytes' is there"]


def read_columns(
    data: bytes,
    path: StoragePath,
    columns: Sequence[Column],
    version_key: bytes,
    check: Callable[[Collection[str]], list[str]] = lambda names: [],
) -> dict[str, list[Any]]:
    """Return the cells of a manifest's Parquet file by column, bytes that are no UTF-8 as lone surrogates.

    `check` returns what else is wrong with the columns' names. Raises ManifestError, naming all that is wrong.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        check_schema(file.schema_arrow, path, columns, version_key, check)
        table = file.read()
        return {name: _cells(table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise ManifestError(
            f"{path} ({len(data)} bytes) cannot be read as Parquet: {error}; write or copy it again"
        ) from error


def _cells(column: pa.ChunkedArray[Any]) -> list[Any]:
    try:
        cells: list[Any] = column.to_pylist()
        return cells
    except UnicodeDecodeError:
        if types.is_map(column.type):
            raise
        # Undecodable bytes become lone surrogates, so that only their own rows are refused.
        binary = column.cast(pa.binary()).to_pylist()
        return [None if cell is None else cell.decode(errors="surrogateescape") for cell in binary]


def check_schema(
    schema: pa.Schema,
    path: StoragePath,
    columns: Sequence[Column],
    version_key: bytes,
    check: Callable[[Collection[str]], list[str]] = lambda names: [],
) -> None:
    """Raise ManifestError, naming all that is wrong, unless a manifest has this version and these columns."""
    version = (schema.metadata or {}).get(version_key, b"1").decode(errors="replace")
    if version != str(MANIFEST_VERSION):
        raise ManifestError(
            f"{path} is a manifest of version {version}; this release reads version {MANIFEST_VERSION}. "
            "Upgrade, or write the manifest again."
        )
    known = {column.name: column for column in columns}
    problems = [
        f"required column {column.name!r} ({column.type}) is missing"
        for column in columns
        if column.required and column.name not in schema.names
    ]
    problems += check(schema.names)
    for name, times in Counter(schema.names).items():
        if times > 1:
            problems.append(f"column {name!r} is there {times} times")
        elif name not in known:
            near = get_close_matches(name, known, n=1)
            problems.append(f"column {name!r} is not known" + (f", did you mean {near[0]!r}?" if near else ""))
        else:
            found, column = schema.field(name).type, known[name]
            # A column of nulls only is written without a type by pandas and pyarrow.
            if not column.accepts(found) and not (types.is_null(found) and not column.required):
                problems.append(f"column {name!r} has type {found}, not {column.type}")
    if problems:
        raise ManifestError(f"{path}: {'; '.join(problems)}")
