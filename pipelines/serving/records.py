"""What the service keeps, as small files beside the batch path's, and the records themselves.

Layout under the store:

    access/                                        keys, sign-in links and sessions (pipelines/serving/access.py)
    runs/service/epochs/                           the dispatcher's turns: one works, another stands by
    tenants/<tenant>/                              an output root as the ledger lays it out: videos/ and runs/
    tenants/<tenant>/identities/<name>/            a person that the tenant learnt (pipelines/identities.py)
    tenants/<tenant>/inputs/                       where a tenant may put manifests and photos
    tenants/<tenant>/runs/on-demand/requests/<id>.json   a single request, written if absent before it is accepted
    tenants/<tenant>/runs/on-demand/uploads/<sha256>.jpg its photo, a JPEG of pixels alone
    tenants/<tenant>/runs/on-demand/removed/<id>   marker: what is left of this request is to be deleted
    tenants/<tenant>/runs/<run_id>/accepted.json   a batch that the service was asked to render
    tenants/<tenant>/runs/<run_id>/ended.json      every row of it has ended, how, and its views are written

Claims, attempts, outcomes, identities and pictures of single requests lie in `runs/on-demand/` as those of any run,
with the request's id as the row's. A request without an outcome or attempt is queued: that is all of the queue.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from echovideo.errors import RequestError
from echovideo.request import RenderRequest
from echovideo.settings import deciding_values
from pipelines.identities import Identities, IdentityCard
from pipelines.ledger import Ledger
from pipelines.serving.config import OnDemandRun, ServiceConfig
from pipelines.storage import StoragePath, encode_json

RECORD_VERSION = 1
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRecord:
    """One accepted request. `created_at` is seconds since 1970, `key_id` who asked, `nonce` this acceptance's alone.

    `request.row_id` is the video's id; its photo is the upload of digest `photo_sha256`. `identity` is the card that
    its `identity_lora` named when it was accepted.
    """

    tenant: str
    key_id: str
    created_at: float
    request: RenderRequest
    photo_sha256: str
    nonce: str
    remixed_from: str | None = None
    identity: IdentityCard | None = None

    @property
    def video_id(self) -> str:
        """The id that the tenant knows it by."""
        return self.request.row_id

    @property
    def fingerprint(self) -> str:
        """The digest of all that was asked for; the same Idempotency-Key must come with the same."""
        asked = {
            "photo": self.photo_sha256,
            "request": deciding_values(self.request),
            "consent_id": self.request.consent_id,
            "identity_lora": self.request.identity_lora,
            "tags": dict(self.request.tags),
            "remixed_from": self.remixed_from,
        }
        return hashlib.sha256(encode_json(asked)).hexdigest()

    def check_repeats(self, earlier: VideoRecord) -> None:
        """Raise RequestError `idempotency_mismatch` unless the record of the same id before asked for the same."""
        if self.fingerprint != earlier.fingerprint:
            raise RequestError(
                "this Idempotency-Key came with another request before; use a new key for a new request",
                code="idempotency_mismatch",
            )

    def to_record(self) -> dict[str, Any]:
        """Return the record as a JSON-able dict."""
        assert self.request.photo_bytes is None
        return {"version": RECORD_VERSION, **asdict(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the record of a `to_record` dict that may have been through JSON."""
        values = {name: value for name, value in record.items() if name != "version"}
        if values.get("identity") is not None:
            values["identity"] = IdentityCard(**values["identity"])
        return cls(**{**values, "request": RenderRequest(**values["request"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row for a renderer: whose it is, which of the tenant's runs it belongs to, and under which epoch."""

    tenant: str
    run_id: str
    epoch: int
    request: RenderRequest

    @property
    def name(self) -> tuple[str, str, str]:
        """What tells the job from all others."""
        return self.tenant, self.run_id, self.request.row_id


class TenantStore:
    """One tenant's single requests in the store."""

    def __init__(self, config: ServiceConfig, tenant: str) -> None:
        self.run = config.on_demand(tenant)
        self.ledger = Ledger(self.run.output_path, self.run.run_id)

    def request_path(self, video_id: str) -> StoragePath:
        """Where a request's record lies."""
        return self.ledger.folder / "requests" / f"{video_id}.json"

    def upload_path(self, photo_sha256: str) -> StoragePath:
        """Where an upload lies."""
        return self.ledger.folder / "uploads" / f"{photo_sha256}.jpg"

    def identity_path(self, photo_sha256: str) -> StoragePath:
        """Where the identity stage keeps what it made of an upload."""
        return self.ledger.folder / "identities" / f"{photo_sha256}.safetensors"

    def removed_path(self, video_id: str) -> StoragePath:
        """The marker of a request that is being deleted."""
        return self.ledger.folder / "removed" / video_id

    def picture_path(self, kind: str, video_id: str) -> StoragePath:
        """Where a stage keeps one of a request's small pictures, a kind of `Ledger.pictures`."""
        return self.ledger.folder / kind / f"{video_id}.jpg"

    def run_of(self, record: VideoRecord) -> OnDemandRun:
        """Return the run as it renders one request: with the identity that it names."""
        card = record.identity
        return replace(self.run, identities={card.name: card} if card else {})

    def accept(self, record: VideoRecord, photo: bytes | None) -> VideoRecord:
        """Write a request with the identity that it names, its photo first, and return the record that stands.

        `photo` is None where the upload is there already. Raises RequestError `idempotency_mismatch` when the id, made
        of an Idempotency-Key, stands for another request, `consent_missing`, `not_found` for an upload that has gone,
        and what `Identities.check` raises.
        """
        if self.run.require_consent and not record.request.consent_id:
            raise RequestError("consent_id is missing, and this service asks for one", code="consent_missing")
        if photo is None and not self.upload_path(record.photo_sha256).exists():
            raise RequestError("the video to be remixed was deleted this moment", code="not_found")
        identity = Identities(self.run.output_path).check(record.request, self.run.model_digest)
        record = replace(record, identity=identity)
        if photo is not None:
            self.upload_path(record.photo_sha256).write_if_absent(photo)
        path = self.request_path(record.video_id)
        if path.write_json_if_absent(record.to_record()):
            return record
        earlier = VideoRecord.from_record(path.read_json())
        record.check_repeats(earlier)
        return earlier


def new_video_id(tenant: str, idempotency_key: str | None) -> str:
    """Return a new id, or the one id that an Idempotency-Key stands for within a tenant."""
    if idempotency_key is None:
        return f"video_{secrets.token_hex(12)}"
    return "video_" + hashlib.sha256(f"{tenant}\n{idempotency_key}".encode()).hexdigest()[:24]


def check_tenant(tenant: str) -> str:
    """Return the tenant's name; raises RequestError unless it is lower-case letters, digits and dashes."""
    if not _TENANT.fullmatch(tenant):
        raise RequestError(
            f"tenant {tenant!r} must be 1 to 63 lower-case letters, digits or '-', and start with no '-'",
            code="invalid_tenant",
        )
    return tenant
