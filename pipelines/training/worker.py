"""The actor of the data job: takes one clip at a time from footage to a shard and an outcome."""

from __future__ import annotations

import hashlib
import json
import pickle
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image

from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits, Identity
from echovideo.faces.packs import open_pack
from echovideo.footage.plan import FootageSettings, plan_take
from echovideo.footage.scan import FootageError, Scan, scan_footage
from echovideo.footage.sheet import scan_sheet, take_sheet
from echovideo.footage.take import Take, take_footage
from echovideo.settings import EngineSettings
from echovideo.training.dataset import NULL, SHARDS, Example, Reference, pack_null, pack_shard
from echovideo.training.encode import ClipEncoder
from echovideo.video import poster_jpeg
from pipelines.ledger import MAX_STRIKES, Claim
from pipelines.outcome import Dead, Rejected
from pipelines.photo_reader import UriPolicy, locate
from pipelines.stages.row import outcome_of_error
from pipelines.storage import StorageOptions, StoragePath
from pipelines.training.clips import Clip
from pipelines.training.outcome import ClipLedger, ClipOutcome, Prepared

_SHEET_SIDE = 960


@dataclass(frozen=True, kw_only=True, slots=True)
class DataJob:
    """What a worker needs to know. `output` is the dataset's folder, `model` a model folder on the worker's machine."""

    output: StoragePath
    run_id: str
    model: str
    footage: FootageSettings
    uri_policy: UriPolicy
    storage: StorageOptions
    engine: EngineSettings

    @property
    def ledger(self) -> ClipLedger:
        """The job's ledger, in the dataset's own folder."""
        return ClipLedger(self.output, self.run_id)

    @property
    def null(self) -> StoragePath:
        """Where the job's null tensors lie until the dataset is published."""
        return self.ledger.folder / NULL


class ClipWorker:
    """One model's face nets and encoders. Whatever befalls a clip becomes its outcome; nothing is raised for it."""

    def __init__(self, job: DataJob, epoch: int) -> None:
        self.job = job
        self.epoch = epoch
        self.ledger = job.ledger
        self.node = ray.get_runtime_context().get_node_id()
        pack = open_pack(Path(job.model) / "face_encoder")
        self.analyzer = FaceAnalyzer(pack, FaceLimits(min_face_px=job.footage.min_face_px))
        self.encoder = ClipEncoder(Path(job.model), job.engine)
        if not job.null.exists():
            job.null.write_bytes(pack_null(self.encoder.null()))

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Take one clip of the graph and return its outcome as JSON."""
        return {"outcome": json.dumps(self.ledger.encode(self.take(pickle.loads(columns["clip"]))))}

    def take(self, clip: Clip) -> ClipOutcome:
        """Claim the clip, work on it and commit its outcome; raises StaleDriverError, or StorageError of the ledger."""
        claim = None
        while claim is None:
            claim = self.ledger.claim(clip.row_id, self.epoch, "prepare", self.node, _node_alive)
        if not isinstance(claim, Claim):
            return claim
        return self.ledger.commit(self._outcome(clip, claim), self.epoch)

    def _outcome(self, clip: Clip, claim: Claim) -> ClipOutcome:
        if claim.strikes >= MAX_STRIKES:
            message = f"this clip took its worker down {claim.strikes} times; it was given up so that the others go on"
            return Dead(row_id=clip.row_id, strikes=claim.strikes, message=message)
        try:
            return self._prepare(clip, claim)
        except FootageError as error:
            return Rejected(row_id=clip.row_id, code=error.code, message=error.message, numbers=error.numbers)
        except Exception as error:
            # An outcome, never an exception, leaves the worker: Ray would end the whole job for one clip's exception.
            return outcome_of_error(error, clip.row_id, "prepare", claim.attempt)

    def _prepare(self, clip: Clip, claim: Claim) -> Prepared:
        path = locate(clip.clip_uri, self.job.uri_policy, self.job.storage)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            footage = Path(folder) / clip.clip_id  # Errors name it.
            path.download_file(footage)
            with footage.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            scan = scan_footage(footage, self.analyzer, self.job.footage.fps)
            take = self._take(clip, footage, scan, sha256)
            self._keep_sheet(clip, take_sheet(footage, take))
            taken = time.perf_counter()
            example, references = self._write_shard(clip, take)
        timings = {"footage": taken - started, "encode": time.perf_counter() - taken}
        return Prepared(
            row_id=clip.row_id,
            attempt=claim.attempt,
            example=example,
            references=references,
            shots=take.plan.shots,
            face_frames=take.plan.face_frames,
            footage_sha256=sha256,
            timings=timings,
        )

    def _take(self, clip: Clip, footage: Path, scan: Scan, sha256: str) -> Take:
        try:
            return take_footage(footage, plan_take(scan, self.job.footage), self.analyzer, sha256)
        except FootageError:
            # What made the footage unusable is what one wants to look at.
            self._keep_sheet(clip, scan_sheet(footage, scan))
            raise

    def _keep_sheet(self, clip: Clip, sheet: Image.Image) -> None:
        jpeg = poster_jpeg(np.asarray(sheet), max_side=_SHEET_SIDE)
        (self.ledger.folder / "sheets" / f"{clip.row_id}.jpg").write_bytes(jpeg)

    def _write_shard(self, clip: Clip, take: Take) -> tuple[Example, tuple[Reference, ...]]:
        faces = {f"{clip.clip_id}@{index}": (index, identity) for index, identity in take.references.items()}
        data = pack_shard(
            {clip.clip_id: self.encoder.example(take, clip.caption)},
            {name: self.encoder.reference(identity, self.job.footage.sizes) for name, (_, identity) in faces.items()},
        )
        sha256 = hashlib.sha256(data).hexdigest()
        shard = f"{sha256}.safetensors"
        (self.job.output / SHARDS / shard).write_bytes(data)
        where: Mapping[str, Any] = {
            "person_id": clip.person_id,
            "clip_id": clip.clip_id,
            "clip_group": clip.clip_group,
            "shard": shard,
            "shard_sha256": sha256,
        }
        example = Example(
            example_id=clip.clip_id,
            caption=clip.caption,
            height=take.plan.height,
            width=take.plan.width,
            num_frames=len(take.plan.frame_indices),
            consent_id=clip.consent_id,
            **where,
        )
        return example, tuple(_reference(name, index, identity, where) for name, (index, identity) in faces.items())


def _reference(name: str, index: int, identity: Identity, where: Mapping[str, Any]) -> Reference:
    return Reference(reference_id=name, frame_index=index, **asdict(identity.quality), **where)


def _node_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
