"""A training dataset: one folder of shards, what is in it, and the record that its writer and its reader share.

    dataset.json          DatasetCard: schema, digest of all that made it, licence, examples per bucket, file digests
    examples.parquet      EXAMPLES_SCHEMA, one row a training example
    references.parquet    REFERENCES_SCHEMA, one row a reference face
    null.safetensors      "text" (226, D) of the empty caption, "tokens" (196, d) of the all-black image, bfloat16
    shards/<sha256>.safetensors     one clip's tensors; the name is the file's own digest
        <example_id>/latents_mean, latents_std  (F, 16, h, w) bfloat16, the clip's VAE posterior, unscaled
        <example_id>/text           (226, D) bfloat16, T5's states of the caption
        <example_id>/face_share     (F, h, w) uint8, share of each latent cell that shows the face, 0..255
        <reference_id>/tokens       (196, d) bfloat16, SigLIP's states of the masked face
        <reference_id>/embedding    (width,) float32, the recogniser's, not normalised
        <reference_id>/face_mean@480x848, face_std@480x848      (16, h, w) bfloat16, unscaled, for each height x width

F, h, w are the latents' own: (frames - 1) / 4 + 1, height / 8, width / 8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from echovideo.errors import DatasetError

SCHEMA = 1
"""Version of the layout above; raised with every change that an older reader would misread."""
DATASET_JSON, EXAMPLES, REFERENCES, NULL = "dataset.json", "examples.parquet", "references.parquet", "null.safetensors"
SHARDS = "shards"
_MAKE_AGAIN = "make the dataset again from its manifest into the same folder: only what is missing is made"

Record = TypeVar("Record", bound="Example | Reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of examples.parquet: a clip of `num_frames` frames, `height` x `width` pixels, and what it shows.

    Clips of one `clip_group` share a recording, so a reference from one says too much of another: clothes, light.
    """

    example_id: str
    person_id: str
    clip_id: str
    clip_group: str
    caption: str
    height: int
    width: int
    num_frames: int
    consent_id: str
    shard: str
    shard_sha256: str

    @property
    def bucket(self) -> str:
        """The shape, as "480x848x49": height, width, frames. Examples of one bucket go into one batch."""
        return bucket_name(self.height, self.width, self.num_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One row of references.parquet: a face of the person, cut from frame `frame_index` of the clip's file.

    `detection_score`, `face_px`, `sharpness` and `yaw_degrees` are echovideo.faces.analyzer.FaceQuality's.
    """

    reference_id: str
    person_id: str
    clip_id: str
    clip_group: str
    frame_index: int
    detection_score: float
    face_px: float
    sharpness: float
    yaw_degrees: float
    shard: str
    shard_sha256: str


def _schema(record: type[Example] | type[Reference], name: str) -> pa.Schema:
    kinds = {"str": pa.string(), "int": pa.int32(), "float": pa.float64()}
    return pa.schema(
        [pa.field(item.name, kinds[str(item.type)], nullable=False) for item in fields(record)],
        metadata={"schema": f"echovideo.training.{name}", "version": str(SCHEMA)},
    )


EXAMPLES_SCHEMA = _schema(Example, "examples")
REFERENCES_SCHEMA = _schema(Reference, "references")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExampleTensors:
    """One example's tensors; the module gives shapes and types."""

    latents_mean_FCHW: Tensor  # noqa: N815
    latents_std_FCHW: Tensor  # noqa: N815
    text_ND: Tensor  # noqa: N815
    face_share_FHW: Tensor  # noqa: N815


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceTensors:
    """One reference's tensors; `posteriors` maps (height, width) in pixels to (mean, std), each (16, h, w)."""

    tokens_ND: Tensor  # noqa: N815
    embedding_D: Tensor  # noqa: N815
    posteriors: Mapping[tuple[int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NullTensors:
    """What stands for no caption and no face: `text_ND` of "" and `tokens_ND` of the all-black image, bfloat16."""

    text_ND: Tensor  # noqa: N815
    tokens_ND: Tensor  # noqa: N815


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCard:
    """dataset.json. `digest` is the SHA-256 of `making`: model, its digest, face nets, settings.

    `licence` is that of the model whose nets made the tensors, which goes on with all that is trained on them.
    `buckets` maps "480x848x49" to {"count": examples}; `files` maps the other files of the folder to their SHA-256.
    """

    digest: str
    licence: str
    making: Mapping[str, Any]
    buckets: Mapping[str, Mapping[str, int]]
    files: Mapping[str, str]
    schema: int = SCHEMA


def bucket_name(height: int, width: int, num_frames: int) -> str:
    """Return a bucket's name, "480x848x49"."""
    return f"{height}x{width}x{num_frames}"


def making_digest(making: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a JSON-able account of all that made a dataset."""
    return hashlib.sha256(json.dumps(making, sort_keys=True, allow_nan=False).encode()).hexdigest()


def pack_shard(examples: Mapping[str, ExampleTensors], references: Mapping[str, ReferenceTensors]) -> bytes:
    """Return one shard's bytes, by example and reference id; equal tensors give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for name, example in examples.items():
        tensors[f"{name}/latents_mean"] = example.latents_mean_FCHW.bfloat16()
        tensors[f"{name}/latents_std"] = example.latents_std_FCHW.bfloat16()
        tensors[f"{name}/text"] = example.text_ND.bfloat16()
        assert example.face_share_FHW.dtype == torch.uint8
        tensors[f"{name}/face_share"] = example.face_share_FHW
    for name, reference in references.items():
        tensors[f"{name}/tokens"] = reference.tokens_ND.bfloat16()
        tensors[f"{name}/embedding"] = reference.embedding_D.float()
        for (height, width), (mean, std) in reference.posteriors.items():
            tensors[f"{name}/face_mean@{height}x{width}"] = mean.bfloat16()
            tensors[f"{name}/face_std@{height}x{width}"] = std.bfloat16()
    return _save(tensors)


def pack_null(null: NullTensors) -> bytes:
    """Return null.safetensors' bytes."""
    return _save({"text": null.text_ND.bfloat16(), "tokens": null.tokens_ND.bfloat16()})


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata={"schema": str(SCHEMA)})


def table(records: Iterable[Example] | Iterable[Reference], schema: pa.Schema) -> pa.Table:
    """Return records as a table of EXAMPLES_SCHEMA or REFERENCES_SCHEMA."""
    return pa.Table.from_pylist([asdict(record) for record in records], schema=schema)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """An opened dataset. A shard's bytes are checked against its digest the first time it is read in a process."""

    folder: Path
    card: DatasetCard
    examples: tuple[Example, ...]
    references: tuple[Reference, ...]
    _by_person: Mapping[str, tuple[Reference, ...]] = field(repr=False)
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def in_clip(self, example: Example) -> tuple[Reference, ...]:
        """Return the references cut from the example's own clip, at least one."""
        return tuple(item for item in self._by_person[example.person_id] if item.clip_id == example.clip_id)

    def cross_clip(self, example: Example) -> tuple[Reference, ...]:
        """Return the person's references from other clip groups; raises DatasetError `one_clip` if there is none."""
        found = tuple(item for item in self._by_person[example.person_id] if item.clip_group != example.clip_group)
        if not found:
            raise _one_clip(self.folder, [example.person_id])
        return found

    def check_cross_clip(self) -> None:
        """Raise DatasetError `one_clip`, naming the people, unless each has references from two clip groups."""
        groups: dict[str, set[str]] = {}
        for reference in self.references:
            groups.setdefault(reference.person_id, set()).add(reference.clip_group)
        alone = sorted(person_id for person_id, names in groups.items() if len(names) < 2)
        if alone:
            raise _one_clip(self.folder, alone)

    def example_tensors(self, example: Example) -> ExampleTensors:
        """Return the example's tensors on the CPU; raises DatasetError `shard_missing` or `shard_damaged`."""
        name = example.example_id
        mean, std, text, share = self._tensors(
            example, [f"{name}/latents_mean", f"{name}/latents_std", f"{name}/text", f"{name}/face_share"]
        )
        return ExampleTensors(latents_mean_FCHW=mean, latents_std_FCHW=std, text_ND=text, face_share_FHW=share)

    def reference_tensors(self, reference: Reference, height: int, width: int) -> ReferenceTensors:
        """Return the reference's tensors with the posterior for one size in pixels; raises as `example_tensors`."""
        name, size = reference.reference_id, f"{height}x{width}"
        tokens, embedding, mean, std = self._tensors(
            reference, [f"{name}/tokens", f"{name}/embedding", f"{name}/face_mean@{size}", f"{name}/face_std@{size}"]
        )
        return ReferenceTensors(tokens_ND=tokens, embedding_D=embedding, posteriors={(height, width): (mean, std)})

    def null(self) -> NullTensors:
        """Return what stands for no caption and no face; raises DatasetError."""
        text, tokens = _read_tensors(self.folder / NULL, ["text", "tokens"])
        return NullTensors(text_ND=text, tokens_ND=tokens)

    def _tensors(self, record: Example | Reference, names: Sequence[str]) -> list[Tensor]:
        self._check(record)
        return _read_tensors(self._path(record), names)

    def _path(self, record: Example | Reference) -> Path:
        return self.folder / SHARDS / record.shard

    def _check(self, record: Example | Reference) -> None:
        if record.shard in self._checked:
            return
        _check_file(self._path(record), record.shard_sha256, missing="shard_missing", damaged="shard_damaged")
        self._checked.add(record.shard)


def open_dataset(folder: Path) -> Dataset:
    """Open a dataset folder and check its card, its tables and the null tensors; shards are checked as they are read.

    Raises DatasetError naming the file, what is wrong with it and what to do.
    """
    card = _read_card(folder / DATASET_JSON)
    for name in (EXAMPLES, REFERENCES, NULL):
        _check_file(folder / name, card.files.get(name, ""), missing="dataset_missing", damaged="dataset_damaged")
    examples = _read_table(folder / EXAMPLES, EXAMPLES_SCHEMA, Example)
    references = _read_table(folder / REFERENCES, REFERENCES_SCHEMA, Reference)
    if not examples:
        raise DatasetError(f"{folder} holds no example; see its report.html for why each clip was left out")
    by_person: dict[str, list[Reference]] = {}
    for reference in references:
        by_person.setdefault(reference.person_id, []).append(reference)
    own = {reference.clip_id for reference in references}
    for example in examples:
        if example.clip_id not in own:
            raise _damaged(folder / REFERENCES, f"no reference of clip {example.clip_id!r}")
    return Dataset(
        folder=folder,
        card=card,
        examples=examples,
        references=references,
        _by_person={person_id: tuple(found) for person_id, found in by_person.items()},
    )


def _read_card(path: Path) -> DatasetCard:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is missing: {path.parent} is no dataset, or one that is still being made", code="dataset_missing"
        ) from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise DatasetError(
            f"{path} has schema {schema!r}; this release reads {SCHEMA}. Make the dataset again, or use the release "
            "that made it",
            code="dataset_schema",
        )
    try:
        card = DatasetCard(**record)
    except TypeError as error:
        raise _damaged(path, str(error)) from error
    if making_digest(card.making) != card.digest:
        raise _damaged(path, "its digest is not that of what it says made it")
    return card


def _read_table(path: Path, schema: pa.Schema, kind: type[Record]) -> tuple[Record, ...]:
    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error)) from error
    if not found.schema.equals(schema, check_metadata=True):
        raise DatasetError(
            f"{path} has other columns than schema {SCHEMA}'s: {', '.join(found.schema.names)}. Make the dataset again",
            code="dataset_schema",
        )
    return tuple(kind(**row) for row in found.to_pylist())


def _read_tensors(path: Path, names: Sequence[str]) -> list[Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("schema") != str(SCHEMA):
                raise DatasetError(f"{path} is not of schema {SCHEMA}; make the dataset again", code="dataset_schema")
            return [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise DatasetError(f"{path}: {error}; {_MAKE_AGAIN}", code="shard_damaged") from error


def _check_file(path: Path, sha256: str, *, missing: str, damaged: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; {_MAKE_AGAIN}", code=missing) from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}", code=damaged) from error
    if found != sha256:
        raise DatasetError(
            f"{path} ({path.stat().st_size} bytes) has SHA-256 {found[:16]}..., {sha256[:16]}... was written: it is "
            f"cut short or damaged. Delete it, then {_MAKE_AGAIN}",
            code=damaged,
        )


def _damaged(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"{path} is damaged: {reason}; {_MAKE_AGAIN}", code="dataset_damaged")


def _one_clip(folder: Path, people: Sequence[str]) -> DatasetError:
    listed = ", ".join(people[:10]) + (f" and {len(people) - 10} more" if len(people) > 10 else "")
    return DatasetError(
        f"{folder}: cross-clip references need two clip groups of each person, and there is one of {listed}. "
        "Add clips of other recordings, leave these people out, or train with in-clip references",
        code="one_clip",
        numbers={"people": len(people)},
    )
