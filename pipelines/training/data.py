"""The data job: a manifest of clips in, a dataset that training reads out.

    summary = prepare_dataset(DataConfig(manifest="clips.parquet", output="dataset", model="models/tiny",
                                         uri_policy=UriPolicy(roots=("/footage",))))

The same call again makes only what is missing: new and changed rows, clips whose attempt failed, shards that are gone.
Clips whose rows are gone, and all that other settings made, are deleted, tensors and pictures. Footage is known by its
address: when a file changes, give it another name, or the clip another clip_id.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from echovideo.faces.packs import pack_name
from echovideo.footage.plan import FootageSettings, settings_for
from echovideo.model.card import ModelCard, folder_digest, read_card
from echovideo.model.config import TransformerConfig, read_config
from echovideo.settings import EngineSettings
from echovideo.training.dataset import (
    DATASET_JSON,
    EXAMPLES,
    EXAMPLES_SCHEMA,
    NULL,
    REFERENCES,
    REFERENCES_SCHEMA,
    SCHEMA,
    SHARDS,
    DatasetCard,
    making_digest,
    table,
)
from pipelines.graph import Pool, stream
from pipelines.outcome import KINDS
from pipelines.photo_reader import UriPolicy
from pipelines.resources import StageResources, check_resources
from pipelines.run import start_ray
from pipelines.storage import StorageOptions, StoragePath, encode_json
from pipelines.training.clips import Clip, ClipManifest, read_clips
from pipelines.training.outcome import ClipLedger, ClipOutcome, Prepared
from pipelines.training.report import ClipView, clips_table, kind_of, render_dataset_report
from pipelines.training.worker import ClipWorker, DataJob

NUMERICS_VERSION = 2
"""Raised with every change of what is taken of footage or how it is encoded, so that no older shard is mixed in."""
CLIPS, REPORT = "clips.parquet", "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """One data job.

    `manifest` and `output` are addresses (a local path or s3://), `model` a model folder on every machine of the
    cluster. `uri_policy` says where footage may be read from. `footage` None takes the model's own sizes and frames.
    `workers` clips are worked on at once, each worker with the whole model's encoders; on CUDA they share one GPU.
    """

    manifest: str
    output: str
    model: str
    uri_policy: UriPolicy = field(default_factory=UriPolicy)
    storage: StorageOptions = field(default_factory=StorageOptions)
    footage: FootageSettings | None = None
    engine: EngineSettings = field(default_factory=EngineSettings)
    workers: int = 1
    ray_address: str = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """What came of a data job: the dataset's digest, each clip's outcome by clip_id, and how many ended how."""

    digest: str
    outcomes: Mapping[str, ClipOutcome]
    counts: Mapping[str, int]


def prepare_dataset(config: DataConfig, worker: type[ClipWorker] = ClipWorker) -> DatasetSummary:
    """Bring every clip of the manifest to one outcome and publish the dataset, its tables, pictures and report.

    Raises ManifestError, WeightsError, StorageError, and RunError: `already_running`, `too_few_resources`,
    `stage_failed`. Whatever stops it, what is finished stays, and the next call goes on.
    """
    output = StoragePath.parse(config.output, config.storage)
    manifest = read_clips(StoragePath.parse(config.manifest, config.storage), config.uri_policy)
    card = read_card(Path(config.model))
    making = _making(config, card)
    job = DataJob(
        output=output,
        run_id=making_digest(making)[:16],
        model=config.model,
        footage=FootageSettings.from_record(making["footage"]),
        uri_policy=config.uri_policy,
        storage=config.storage,
        engine=config.engine,
    )
    ledger = job.ledger
    ledger.write_config({"making": making, "manifest": config.manifest, "manifest_digest": manifest.digest})
    with ledger.open_epoch() as epoch:
        _forget(ledger, manifest.clips, output, job.null)
        unfinished = set(ledger.remaining(clip.row_id for clip in manifest.clips))
        remaining = [clip for clip in manifest.clips if clip.row_id in unfinished]
        if remaining:
            _run(remaining, config, job, epoch.number, worker)
        outcomes = _outcomes(manifest, ledger)
        _forget_other_settings(job)
        _publish(manifest, outcomes, making, card, job)
    counted = Counter(kind_of(outcome) for outcome in outcomes.values())
    return DatasetSummary(
        digest=making_digest(making), outcomes=outcomes, counts={kind: counted[kind] for kind in KINDS}
    )


def _making(config: DataConfig, card: ModelCard) -> dict[str, Any]:
    """Return all that decides the tensors of a clip, JSON-able."""
    folder = Path(config.model)
    nets = pack_name(folder / "face_encoder")
    model = TransformerConfig.from_dict(read_config(folder / "transformer"))
    making = {
        "schema": SCHEMA,
        "numerics": {"version": NUMERICS_VERSION, **asdict(config.engine)},
        "model": card.name,
        "model_digest": folder_digest(folder),
        "face_nets": nets,
        "footage": asdict(config.footage or settings_for(model, nets)),
    }
    # As it will be read back: lists for tuples.
    record: dict[str, Any] = json.loads(json.dumps(making))
    return record


def _forget(ledger: ClipLedger, clips: Sequence[Clip], output: StoragePath, null: StoragePath) -> None:
    """Forget clips whose rows are gone, and finished ones whose shard is, so that they are made again."""
    wanted = {clip.row_id for clip in clips}
    shards = set((output / SHARDS).list_names())
    outcomes = ledger.outcomes()
    prepared = {row_id: outcome.example for row_id, outcome in outcomes.items() if isinstance(outcome, Prepared)}
    lost = {row_id for row_id, example in prepared.items() if example.shard not in shards}
    if not null.exists():
        # A worker writes the null tensors as it starts, so one clip must be made again for one to start.
        lost |= set(sorted(prepared)[:1])
    for row_id in sorted(lost | (set(outcomes) - wanted)):
        ledger.forget_row(row_id)


def _forget_other_settings(job: DataJob) -> None:
    """Delete the ledgers of other settings, pictures and all; raises `already_running` while one is at work."""
    for run_id in (job.output / "runs").list_names():
        if run_id != job.run_id:
            other = ClipLedger(job.output, run_id)
            other.open_epoch().close()
            other.folder.delete_tree()


def _run(clips: Sequence[Clip], config: DataConfig, job: DataJob, epoch: int, worker: type[ClipWorker]) -> None:
    resources = StageResources(
        name="prepare",
        actors=config.workers,
        num_cpus=1.0,
        num_gpus=1 / config.workers if config.engine.device == "cuda" else 0.0,
    )
    start_ray(config.ray_address)
    check_resources((resources,), ray.cluster_resources())
    rows = [{"clip": pickle.dumps(clip)} for clip in sorted(clips, key=lambda clip: clip.row_id)]
    for columns in stream(rows, [Pool(actor=worker, arguments=(job, epoch), resources=resources)]):
        outcome = job.ledger.decode(json.loads(columns["outcome"]))
        print(f"{outcome.row_id}: {kind_of(outcome)}", flush=True)


def _outcomes(manifest: ClipManifest, ledger: ClipLedger) -> dict[str, ClipOutcome]:
    """Return every row's outcome by clip_id: the refused ones first, then the others as the manifest has them."""
    found = ledger.outcomes()
    outcomes: dict[str, ClipOutcome] = {refusal.row_id: refusal.outcome() for refusal in manifest.refusals}
    outcomes |= {clip.clip_id: found[clip.row_id] for clip in manifest.clips}
    prepared = {clip_id: outcome for clip_id, outcome in outcomes.items() if isinstance(outcome, Prepared)}
    recordings = _recordings(prepared.values())
    groups: dict[str, set[str]] = {}
    for outcome in prepared.values():
        groups.setdefault(outcome.example.person_id, set()).add(recordings[outcome.example.clip_group])
    return outcomes | {
        clip_id: replace(
            outcome,
            example=replace(outcome.example, clip_group=recordings[outcome.example.clip_group]),
            references=tuple(replace(item, clip_group=recordings[item.clip_group]) for item in outcome.references),
            warning="one_clip" if len(groups[outcome.example.person_id]) == 1 else "",
        )
        for clip_id, outcome in prepared.items()
    }


def _recordings(prepared: Iterable[Prepared]) -> dict[str, str]:
    """Return each clip group's recording: groups with a file in common are one."""
    recordings: dict[str, str] = {}
    of_file: dict[str, str] = {}
    for outcome in prepared:
        group = outcome.example.clip_group
        own = recordings.setdefault(group, group)
        first = recordings[of_file.setdefault(outcome.footage_sha256, group)]
        recordings = {name: first if recording == own else recording for name, recording in recordings.items()}
    return recordings


def _publish(
    manifest: ClipManifest,
    outcomes: Mapping[str, ClipOutcome],
    making: Mapping[str, Any],
    card: ModelCard,
    job: DataJob,
) -> None:
    """Write the dataset's tables and card; the card goes first and comes last, so no reader sees halves of two."""
    output = job.output
    (output / DATASET_JSON).delete()
    prepared = [outcome for outcome in outcomes.values() if isinstance(outcome, Prepared)]
    examples = [outcome.example for outcome in prepared]
    references = [reference for outcome in prepared for reference in outcome.references]
    files = {
        EXAMPLES: _parquet(table(examples, EXAMPLES_SCHEMA)),
        REFERENCES: _parquet(table(references, REFERENCES_SCHEMA)),
    }
    if job.null.exists():
        files[NULL] = job.null.read_bytes()
    for name, data in files.items():
        (output / name).write_bytes(data)
    kept = {example.shard for example in examples}
    for name in (output / SHARDS).list_names():
        if name not in kept:
            (output / SHARDS / name).delete()
    buckets = Counter(example.bucket for example in examples)
    dataset = DatasetCard(
        digest=making_digest(making),
        licence=card.licence,
        making=making,
        buckets={bucket: {"count": count} for bucket, count in sorted(buckets.items())},
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
    views = _views(manifest, outcomes, job.ledger)
    (output / CLIPS).write_bytes(_parquet(clips_table(views)))
    (output / REPORT).write_bytes(render_dataset_report(dataset, views).encode())
    (output / DATASET_JSON).write_bytes(encode_json(asdict(dataset)))


def _views(manifest: ClipManifest, outcomes: Mapping[str, ClipOutcome], ledger: ClipLedger) -> list[ClipView]:
    clips = {clip.clip_id: clip for clip in manifest.clips}
    sheets = set((ledger.folder / "sheets").list_names())

    def view(clip_id: str, outcome: ClipOutcome) -> ClipView:
        clip, name = clips.get(clip_id), f"{outcome.row_id}.jpg"
        return ClipView(
            clip_id=clip_id,
            person_id=clip.person_id if clip else "",
            caption=clip.caption if clip else "",
            outcome=outcome,
            read_sheet=(ledger.folder / "sheets" / name).read_bytes if name in sheets else None,
        )

    return [view(clip_id, outcome) for clip_id, outcome in outcomes.items()]


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, write_page_checksum=True)
    return buffer.getvalue()
