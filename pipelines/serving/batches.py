"""Batches that the service renders: runs like any other, whose rows wait behind single requests."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from echovideo.errors import EchoVideoError
from echovideo.request import RenderRequest
from pipelines.config import RunConfig
from pipelines.ledger import Epoch, Ledger
from pipelines.manifest import Manifest
from pipelines.outcome import KINDS, RowOutcome, kind_of
from pipelines.publish import CONTACT_SHEET, REPORT, RESULTS, publish
from pipelines.serving.config import ON_DEMAND, ServiceConfig
from pipelines.storage import NotFoundError
from pipelines.validation import check_identities, validate

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Batch:
    """A batch at work: its run, its driver's turn, and the rows that have not ended."""

    tenant: str
    run: RunConfig
    ledger: Ledger
    epoch: Epoch
    manifest: Manifest
    requests: dict[str, RenderRequest]
    remaining: set[str]
    counts: Counter[str]
    cancelling: bool = False
    finishing: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the manifest."""
        return len(self.manifest.requests) + len(self.manifest.refusals)

    @property
    def by_kind(self) -> dict[str, int]:
        """Rows that have ended, by each kind of outcome."""
        return {kind: self.counts[kind] for kind in KINDS}

    def take_requests(self) -> list[RenderRequest]:
        """Return the rows to be queued, once: by bucket, so that a renderer keeps one shape, then by photo."""
        rows = sorted(self.requests.values(), key=lambda row: (row.bucket, row.photo_uri or "", row.row_id))
        self.requests = {}
        return rows

    def take(self, outcome: RowOutcome) -> None:
        """Count a row that has ended."""
        self.remaining.discard(outcome.row_id)
        self.counts[kind_of(outcome)] += 1


class Batches:
    """Every tenant's batches: those at work in `live`, the others in the store."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.live: dict[tuple[str, str], Batch] = {}
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def start(self, tenant: str, run: RunConfig) -> Batch:
        """Become the driver of a run, or return the batch that is at work; what ended without a video is tried again.

        Raises RunError `already_running` while another driver lives, and what `validate` raises.
        """
        async with self._starting[tenant]:
            batch = self.live.get((tenant, run.run_id))
            if batch is None:
                batch = await asyncio.to_thread(_open, tenant, run)
                self.live[tenant, run.run_id] = batch
                if not batch.remaining:
                    await self.finish(batch)
            return batch

    async def finish(self, batch: Batch) -> None:
        """Write the views of a batch whose rows have all ended, and end the driver's turn."""
        if not batch.finishing:
            batch.finishing = True
            await asyncio.to_thread(_close, batch)
            del self.live[batch.tenant, batch.run.run_id]

    async def unfinished(self, tenant: str) -> list[RunConfig]:
        """Return the tenant's batches that were accepted and have not ended."""
        return await asyncio.to_thread(self._unfinished, tenant)

    async def view(self, tenant: str, run_id: str) -> dict[str, Any] | None:
        """Return the batch document, None if the tenant has no such batch; see the service's OpenAPI."""
        return await asyncio.to_thread(self._view, tenant, run_id)

    async def views(self, tenant: str) -> list[dict[str, Any]]:
        """Return the tenant's batch documents, the newest first."""
        views = await asyncio.to_thread(lambda: [self._view(tenant, run_id) for run_id in self._run_ids(tenant)])
        return sorted((view for view in views if view), key=lambda view: (-view["created_at"], view["id"]))

    async def delete(self, tenant: str, run_id: str) -> bool:
        """Delete a run that nobody drives; False if there is none. Raises RunError `already_running`."""
        if run_id not in await asyncio.to_thread(self._run_ids, tenant):
            return False
        await asyncio.to_thread(self._ledger(tenant, run_id).delete_run)
        return True

    async def delete_older(self, tenant: str, before: float) -> None:
        """Delete the tenant's batches that have ended and were made before a time in seconds since 1970."""
        for view in await self.views(tenant):
            if view["status"] in ("completed", "cancelled", "failed") and view["created_at"] < before:
                await self.delete(tenant, view["id"])

    def close(self) -> None:
        """End every turn; the next dispatcher goes on."""
        for batch in self.live.values():
            batch.epoch.close()

    def _ledger(self, tenant: str, run_id: str) -> Ledger:
        return Ledger(self.config.tenant_root(tenant), run_id)

    def _run_ids(self, tenant: str) -> list[str]:
        names = (self.config.tenant_root(tenant) / "runs").list_names()
        return [name for name in names if name != ON_DEMAND]

    def _unfinished(self, tenant: str) -> list[RunConfig]:
        found = []
        for run_id in self._run_ids(tenant):
            ledger = self._ledger(tenant, run_id)
            if (ledger.folder / "accepted.json").exists() and not (ledger.folder / "ended.json").exists():
                found.append(RunConfig.from_record(ledger.read_config()))
        return found

    def _view(self, tenant: str, run_id: str) -> dict[str, Any] | None:
        batch, ledger = self.live.get((tenant, run_id)), self._ledger(tenant, run_id)
        try:
            config = ledger.read_config()
            created_at = (ledger.folder / "run.json").stat().modified_s
        except NotFoundError:
            return None
        accepted = _read(ledger, "accepted.json") or {}
        ended = _read(ledger, "ended.json")
        if batch is not None:
            counts = batch.by_kind
        elif ended and "counts" in ended and not (ledger.folder / f"epochs/{ended['epoch'] + 1}.json").exists():
            # Written down, because to count is to read every row.
            counts = ended["counts"]
        else:
            counts = ledger.counts()
        num_ended = sum(counts.values())
        error = (ended or {}).get("error")
        if batch is not None:
            status = "finalizing" if batch.finishing else "cancelling" if batch.cancelling else "in_progress"
        elif error is not None:
            status = "failed"
        elif counts["cancelled"]:
            status = "cancelled"
        else:
            # A run of the command line's in this namespace may be at work elsewhere.
            status = "in_progress" if ended is None and accepted else "completed"
        files = f"/v1/files/runs/{run_id}"
        return {
            "id": run_id,
            "object": "batch",
            "status": status,
            "created_at": int(accepted.get("created_at", created_at)),
            "manifest": config["manifest"].rsplit("/", 1)[-1],
            "model": config["card"]["name"],
            "request_counts": {
                "total": batch.num_rows if batch else accepted.get("num_rows", num_ended),
                "completed": counts["ok"],
                "failed": num_ended - counts["ok"],
            },
            "counts": counts,
            "error": error,
            "results": {
                name: f"{files}/{file}" if (ledger.folder / file).exists() else None
                for name, file in (("table", RESULTS), ("report", REPORT), ("contact_sheet", CONTACT_SHEET))
            },
        }


def _open(tenant: str, run: RunConfig) -> Batch:
    ledger = Ledger(run.output_path, run.run_id)
    (ledger.folder / "ended.json").delete()
    ledger.withdraw_cancel()
    try:
        manifest = validate(run)
        check_identities(run, manifest)
    except EchoVideoError as error:
        # The manifest, or an identity, has gone or changed since it was accepted: nothing of it can be rendered.
        (ledger.folder / "ended.json").write_json({"error": {"code": error.code, "message": error.message}})
        raise
    epoch = ledger.open_epoch()
    for refusal in manifest.refusals:
        ledger.commit(refusal.outcome(), epoch.number)
    remaining = set(ledger.remaining(request.row_id for request in manifest.requests))
    outcomes = ledger.outcomes()
    return Batch(
        tenant=tenant,
        run=run,
        ledger=ledger,
        epoch=epoch,
        manifest=manifest,
        requests={request.row_id: request for request in manifest.requests if request.row_id in remaining},
        remaining=remaining,
        counts=Counter(kind_of(outcome) for row_id, outcome in outcomes.items() if row_id not in remaining),
    )


def _close(batch: Batch) -> None:
    try:
        publish(batch.run, batch.manifest, batch.ledger)
        ended = {"error": None, "epoch": batch.epoch.number, "counts": batch.by_kind}
        (batch.ledger.folder / "ended.json").write_json(ended)
    except EchoVideoError as error:
        # Its rows are committed all the same; the views can be made again.
        _log.error("the report of run %s was not written: %s", batch.run.run_id, error)
        (batch.ledger.folder / "ended.json").write_json({"error": {"code": error.code, "message": error.message}})
    finally:
        batch.epoch.close()


def _read(ledger: Ledger, name: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = (ledger.folder / name).read_json()
    except NotFoundError:
        return None
    return record
