"""The dispatcher: one replica that knows every request, decides whose turn it is, and drives the renderers.

It keeps nothing that the records do not hold: at its start it rebuilds its index from them. It is the driver, in the
ledger's sense, of each tenant's single requests and of each batch. A second dispatcher stands by until the first one's
heartbeat ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from echovideo.errors import EchoVideoError, RequestError, RunError, StorageError
from echovideo.request import RenderRequest
from echovideo.settings import video_key
from pipelines.config import RunConfig
from pipelines.ledger import Epoch, Ledger
from pipelines.outcome import Cancelled, Ok, Rejected, RowOutcome, from_record
from pipelines.serving.access import Access, Key
from pipelines.serving.batches import Batch, Batches
from pipelines.serving.config import ON_DEMAND, ServiceConfig
from pipelines.serving.index import BATCH, INTERACTIVE, Entries, Entry, Estimates, Order, Place, Queue, error_of
from pipelines.serving.metrics import Metrics
from pipelines.serving.records import Job, TenantStore, VideoRecord

SWEEP_EVERY_S = 600.0
_STANDBY_CHECK_S = 1.0
_PAUSE_S = 2.0
_PURGE_AGAIN_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Why the dispatcher does not do what it was asked, in HTTP's terms."""

    status: int
    code: str
    message: str
    retry_after_s: float | None = None


_STANDBY = Refused(
    status=503,
    code="starting",
    message="the service is starting, or waits for another dispatcher to end; try again",
    retry_after_s=2,
)


@dataclass(slots=True, eq=False)
class Accepting:
    """A request that is being written; others of the same id wait until that has ended."""

    record: VideoRecord
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Tenant:
    """One tenant's requests, and what guards their files: one admission or deletion at a time."""

    store: TenantStore
    entries: Entries = field(default_factory=Entries)
    epoch: Epoch | None = None
    files: asyncio.Lock = field(default_factory=asyncio.Lock)
    accepting: dict[str, Accepting] = field(default_factory=dict)
    """Requests let in that are being written, by video id."""
    removing: dict[str, VideoRecord] = field(default_factory=dict)


@dataclass(slots=True)
class Bucket:
    """A key's token bucket: a minute's requests may come at once."""

    tokens: float
    filled_at: float


Found = tuple[VideoRecord, dict[str, Any], RowOutcome | None]
"""A request's record, its video document, and its outcome if it has ended."""

P = ParamSpec("P")
T = TypeVar("T")


def _once_ready(
    method: Callable[Concatenate[Dispatcher, P], Awaitable[T]],
) -> Callable[Concatenate[Dispatcher, P], Coroutine[Any, Any, T | Refused]]:
    @wraps(method)
    async def checked(self: Dispatcher, /, *args: P.args, **kwargs: P.kwargs) -> T | Refused:
        if not self.ready:
            return _STANDBY
        # Serve cancels the call of a client that hangs up; what has begun to be written must get into the index too.
        call = asyncio.ensure_future(method(self, *args, **kwargs))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.shield(call)

    return checked


class Dispatcher:
    """See the module. Its methods answer Refused where a caller is to be refused."""

    def __init__(self, config: ServiceConfig, renderer: DeploymentHandle[Any], faces: DeploymentHandle[Any]) -> None:
        self.config = config
        self.renderer = renderer
        self.faces = faces
        self.ready = False
        self.draining = False
        self.tenants: dict[str, Tenant] = {}
        self.queue = Queue()
        self.running: dict[tuple[str, str, str], Job] = {}
        self.active: defaultdict[str, set[str]] = defaultdict(set)
        self.buckets: dict[str, Bucket] = {}
        self.estimates = Estimates()
        self.metrics = Metrics()
        self.batches = Batches(config)
        self._wake = asyncio.Event()
        self._nets = ""
        self._fatal: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Future[Any]] = set()
        self._background(self._work())

    def check_health(self) -> None:
        """Raise what ended this dispatcher's work, so that another is started in its place."""
        if self._fatal is not None:
            raise RuntimeError("the dispatcher's work has ended") from self._fatal

    # Answers for the ingress.

    @_once_ready
    async def accept(self, record: VideoRecord, key: Key, photo: bytes | None) -> dict[str, Any] | Refused:
        """Let a request in, write it with its photo, queue it, and return it as it stands; or refuse it.

        `photo` is None where the upload is there already. One that is known already is returned as it stands.
        """
        home, video_id = self._tenant(record.tenant), record.video_id
        while True:
            async with home.files:
                other = home.accepting.get(video_id)
                if other is None:
                    earlier = home.entries.get(video_id)
                    if earlier is not None:
                        return self._repeated(record, earlier)
                    refused = self._refusal(home, record, key)
                    if refused is not None:
                        return refused
                    accepting = home.accepting[video_id] = Accepting(record)
                    break
            await other.ended.wait()
        try:
            entry = Entry(await asyncio.to_thread(home.store.accept, record, photo))
        except RequestError as error:
            return self._refuse(422, error.code, error.message)
        except StorageError as error:
            _log.error("the store failed: %s", error)
            return self._refuse(503, error.code, "the store cannot be reached; try again", 5)
        finally:
            del home.accepting[video_id]
            accepting.ended.set()
        home.entries.add(entry)
        self._queue_entry(entry)
        return self._view(entry)

    @_once_ready
    async def allow(self, key: Key) -> bool | Refused:
        """Count a request that makes work but no video against the key's rate."""
        return self._over_rate(key) or True

    @_once_ready
    async def find(self, names: Sequence[tuple[str, str]]) -> list[Found | None]:
        """Return each (tenant, video id)'s record, how it stands and its outcome; None where there is no such video."""
        entries = [self._tenant(tenant).entries.get(video_id) for tenant, video_id in names]
        return [None if entry is None else (entry.record, self._view(entry), entry.outcome) for entry in entries]

    @_once_ready
    async def videos(
        self, tenant: str, limit: int, after: str | None, order: Order
    ) -> tuple[list[dict[str, Any]], bool] | None:
        """Return a page of the tenant's videos and whether there are more, None if there is no video `after`."""
        try:
            entries, more = self._tenant(tenant).entries.page(limit=limit, after=after, order=order)
        except KeyError:
            return None
        return [self._view(entry) for entry in entries], more

    @_once_ready
    async def watch(
        self, tenant: str, video_id: str, seen: int, seen_preview: int, timeout_s: float
    ) -> dict[str, Any] | None:
        """Return how a video stands once it differs from version `seen`, or after `timeout_s`; None if it is gone."""
        entry = self._tenant(tenant).entries.get(video_id)
        if entry is not None and entry.version == seen:
            try:
                async with asyncio.timeout(timeout_s):
                    await entry.changed.wait()
            except TimeoutError:
                pass
            entry = self._tenant(tenant).entries.get(video_id)
        if entry is None:
            return None
        fresh = entry.preview is not None and entry.preview_version != seen_preview
        return {
            "version": entry.version,
            "video": self._view(entry),
            "preview": entry.preview if fresh else None,
            "preview_version": entry.preview_version,
        }

    @_once_ready
    async def delete(self, tenant: str, video_id: str) -> bool:
        """Delete a video, and stop its work before its next step; False if the tenant has no such video."""
        home = self._tenant(tenant)
        if home.entries.get(video_id) is None:
            return False
        async with home.files:
            await asyncio.to_thread(home.store.removed_path(video_id).write_bytes, b"")
            entry = home.entries.remove(video_id)
            if entry is None:
                return False
            home.removing[video_id] = entry.record
        self.active[entry.record.key_id].discard(video_id)
        entry.change()
        name = (tenant, ON_DEMAND, video_id)
        self.queue.remove(name)
        if name not in self.running:
            self._background(self._purge(home, entry.record, entry.outcome))
        return True

    @_once_ready
    async def delete_older(self, tenant: str, before: float) -> int:
        """Delete the tenant's ended videos made before a time in seconds since 1970, and return how many."""
        old = [
            entry.record.video_id
            for entry in self._tenant(tenant).entries
            if entry.outcome is not None and entry.record.created_at < before
        ]
        for video_id in old:
            await self.delete(tenant, video_id)
        return len(old)

    @_once_ready
    async def estimate(self, request: RenderRequest) -> dict[str, float | None]:
        """Return how long a request would wait and then take, in seconds; None while nothing is known."""
        return {
            "queue_seconds": self._wait_s(self.queue.num_interactive()),
            "render_seconds": self.estimates.render_s(request),
        }

    @_once_ready
    async def measured(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        self.metrics.queued.set(len(self.queue))
        self.metrics.in_progress.set(len(self.running))
        return self.metrics.text()

    @_once_ready
    async def start_batch(self, tenant: str, run: RunConfig) -> dict[str, Any] | Refused:
        """Take up a batch that has been accepted, or go on with it, and return it as it stands."""
        try:
            self._queue_batch(await self.batches.start(tenant, run))
        except RunError as error:
            return self._refuse(409, error.code, error.message, 5)
        view = await self.batches.view(tenant, run.run_id)
        assert view is not None
        return view

    @_once_ready
    async def batch(self, tenant: str, run_id: str) -> dict[str, Any] | None:
        """Return a batch as it stands, None if the tenant has no such batch."""
        return await self.batches.view(tenant, run_id)

    @_once_ready
    async def all_batches(self, tenant: str) -> list[dict[str, Any]]:
        """Return the tenant's batches, the newest first."""
        return await self.batches.views(tenant)

    @_once_ready
    async def cancel_batch(self, tenant: str, run_id: str) -> dict[str, Any] | None:
        """Stop a batch before its rows' next steps; what is done stays. None if the tenant has no such batch."""
        batch = self.batches.live.get((tenant, run_id))
        if batch is not None:
            await asyncio.to_thread(batch.ledger.request_cancel)
            batch.cancelling = True
            for row_id in list(batch.remaining):
                if self.queue.remove((tenant, run_id, row_id)):
                    await self._row_ended(batch, Cancelled(row_id=row_id, attempt=0), commit=True)
        return await self.batches.view(tenant, run_id)

    @_once_ready
    async def delete_batch(self, tenant: str, run_id: str) -> bool | Refused:
        """Delete a batch that has ended, with every video that nothing else refers to; False if there is none."""
        if (tenant, run_id) in self.batches.live:
            return self._refuse(409, "already_running", "the batch is running; cancel it first", 5)
        return await self.batches.delete(tenant, run_id)

    async def health(self) -> bool:
        """Return whether this dispatcher is at work, and not standing by."""
        return self.ready

    async def drain(self) -> None:
        """Start no more work, let in no more, and return once what runs has ended. The queue stays in the records."""
        self.draining = True
        while self.running:
            self._wake.clear()
            await self._wake.wait()
        await asyncio.to_thread(self._close_epochs)

    # What renderers say.

    async def report(
        self, name: tuple[str, str, str], epoch: int, step: int, steps: int, preview: bytes | None
    ) -> bool:
        """Take in that a job is about to take a step, and return whether it may."""
        job, (tenant, run_id, row_id) = self.running.get(name), name
        batch = self.batches.live.get((tenant, run_id))
        if job is None or job.epoch != epoch:
            turn = self._tenant(tenant).epoch if run_id == ON_DEMAND else batch and batch.epoch
            # Told to stop before this dispatcher's turn at the run, it would commit that it was cancelled.
            return turn is None
        if run_id != ON_DEMAND:
            return batch is not None and not batch.cancelling
        entry = self._tenant(tenant).entries.get(row_id)
        if entry is None:
            return False
        if entry.status == "queued":
            entry.status, entry.started_at = "in_progress", time.monotonic()
            self.metrics.wait.observe(time.time() - entry.record.created_at)
        if step == 0 or entry.stepped_at is None:
            entry.stepped_at = time.monotonic()
        entry.step, entry.steps = step, steps
        if preview is not None:
            entry.preview, entry.preview_version = preview, entry.preview_version + 1
        entry.change()
        return True

    # The work itself.

    async def _work(self) -> None:
        await self._take_over()
        self._background(self._sweep_for_ever())
        while True:
            self._wake.clear()
            while len(self.queue) and len(self.running) < self.config.num_renderers and not self.draining:
                job, place = self.queue.pop()
                self.running[job.name] = job
                self._background(self._run(job, place))
            await self._wake.wait()

    async def _take_over(self) -> None:
        """Wait for this dispatcher's turn, then rebuild the index."""
        self._turn = await _turn_at(Ledger(self.config.store_path, "service"))
        for tenant in await asyncio.to_thread((self.config.store_path / "tenants").list_names):
            await self._rebuild(tenant)
        self.ready = True

    async def _rebuild(self, tenant: str) -> None:
        home = self._tenant(tenant)
        if await asyncio.to_thread(home.store.ledger.is_open):
            # A renderer may still work for the dispatcher before; what it commits after this is read must be refused.
            home.epoch = await _turn_at(home.store.ledger)
        found = await asyncio.to_thread(_read_tenant, home.store)
        await asyncio.to_thread(_delete_strays, home.store, {record.photo_sha256 for record, *_ in found})
        for record, outcome, ended_at, removed in found:
            if removed:
                home.removing[record.video_id] = record
                self._background(self._purge(home, record, outcome))
                continue
            entry = Entry(record)
            home.entries.add(entry)
            if outcome is None or isinstance(outcome, Cancelled):
                self._queue_entry(entry)
            else:
                entry.end(outcome, ended_at)
                self._learn(record.request, outcome)
        for run in await self.batches.unfinished(tenant):
            self._background(self._resume(tenant, run))

    async def _resume(self, tenant: str, run: RunConfig) -> None:
        try:
            self._queue_batch(await self.batches.start(tenant, run))
        except EchoVideoError as error:
            _log.error("batch %s is not resumed: %s", run.run_id, error)

    async def _run(self, job: Job, place: Place) -> None:
        """Have a job rendered; if its renderer is lost, it goes back to its place in the queue."""
        tenant, run_id, row_id = job.name
        home, batch = self._tenant(tenant), self.batches.live.get((tenant, run_id))
        entry = home.entries.get(row_id) if run_id == ON_DEMAND else None
        if batch is not None:
            run = batch.run
        else:
            # What is deleted before this begins is told to stop at its first step, and purged when it has.
            run = home.store.run_of(home.removing[row_id] if entry is None else entry.record)
        try:
            epoch = await self._epoch_of(home) if batch is None else batch.epoch
            job = Job(tenant=tenant, run_id=run_id, epoch=epoch.number, request=job.request)
            self.running[job.name] = job
            answer = await self.renderer.render.remote(job, run)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if getattr(getattr(error, "cause", error), "code", "") == "stale_driver":
                self._fatal = error
                self.ready = False
                return
            # The renderer was lost, or could not reach the ledger: the claim it left tells whose fault that is.
            lost = isinstance(error, RayActorError)
            _log.warning("%s goes back to the queue: %s", row_id, type(error).__name__ if lost else error)
            self.metrics.redone.inc()
            if not lost:
                await asyncio.sleep(_PAUSE_S)
            del self.running[job.name]
            self._put_back(job, place, home, entry, batch)
        else:
            outcome = from_record(answer["outcome"])
            del self.running[job.name]
            self.metrics.ended(outcome, job.request.num_inference_steps, answer["memory"])
            self._learn(job.request, outcome)
            if batch is not None:
                await self._row_ended(batch, outcome, commit=False)
            elif row_id in home.removing:
                self._background(self._purge(home, home.removing[row_id], outcome))
            elif entry is not None:
                self.active[entry.record.key_id].discard(row_id)
                entry.end(outcome, time.time())
        finally:
            self._wake.set()

    async def _epoch_of(self, home: Tenant) -> Epoch:
        """Return the turn at a tenant's single requests, taken when the first of them is."""
        async with home.files:
            if home.epoch is None:
                home.epoch = await asyncio.to_thread(home.store.ledger.open_epoch)
            return home.epoch

    def _put_back(self, job: Job, place: Place, home: Tenant, entry: Entry | None, batch: Batch | None) -> None:
        row_id = job.request.row_id
        if batch is None and row_id in home.removing:
            self._background(self._purge(home, home.removing[row_id], None))
            return
        if entry is not None:
            entry.status, entry.step, entry.started_at, entry.stepped_at = "queued", 0, None, None
            entry.change()
        self.queue.put(job, place)

    async def _row_ended(self, batch: Batch, outcome: RowOutcome, *, commit: bool) -> None:
        if commit:
            await asyncio.to_thread(batch.ledger.commit, outcome, batch.epoch.number)
        batch.take(outcome)
        if not batch.remaining:
            await self.batches.finish(batch)

    async def _purge(self, home: Tenant, record: VideoRecord, outcome: RowOutcome | None) -> None:
        """Delete all files of a request that nothing else needs, its marker last."""
        while record.video_id in home.removing:
            try:
                # It may be loading, busy or lost.
                nets = self._nets = self._nets or await self.faces.nets.remote()
                key = self._key(record, outcome, nets)
                async with home.files:
                    others = list(home.entries)
                    shared = any(self._key(other.record, other.outcome, nets) == key for other in others)
                    needed = {other.record.photo_sha256 for other in others}
                    needed |= {other.record.photo_sha256 for other in home.accepting.values()}
                    await asyncio.to_thread(
                        _delete_request,
                        home.store,
                        record,
                        None if shared else key,
                        photo_too=record.photo_sha256 not in needed,
                    )
                    home.removing.pop(record.video_id, None)
                    return
            except (StorageError, RayError, RayServeException) as error:
                _log.warning("%s is not deleted yet: %s", record.video_id, error)
            await asyncio.sleep(_PURGE_AGAIN_S)

    def _key(self, record: VideoRecord, outcome: RowOutcome | None, nets: str) -> str:
        if isinstance(outcome, Ok | Rejected) and outcome.sidecar_uri is not None:
            return outcome.sidecar_uri.rsplit("/", 1)[-1].removesuffix(".json")
        return video_key(
            record.request,
            photo_sha256=record.photo_sha256,
            face_nets=nets,
            model_digest=self.config.model_digest,
            settings=self.config.engine,
            adapter_sha256=record.identity.sha256 if record.identity else None,
        )

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                if self.config.retention_days is not None:
                    before = time.time() - self.config.retention_days * 86400
                    for tenant in list(self.tenants):
                        await self.delete_older(tenant, before)
                        await self.batches.delete_older(tenant, before)
                await asyncio.to_thread(Access(self.config.store_path).sweep, time.time())
            except EchoVideoError as error:
                # The store is away, or the command line is at work on an old batch.
                _log.warning("what is old is deleted later: %s", error)
            await asyncio.sleep(SWEEP_EVERY_S)

    # Small things.

    def _tenant(self, tenant: str) -> Tenant:
        if tenant not in self.tenants:
            self.tenants[tenant] = Tenant(TenantStore(self.config, tenant))
        return self.tenants[tenant]

    def _queue_entry(self, entry: Entry) -> None:
        record = entry.record
        self.active[record.key_id].add(record.video_id)
        upload = self._tenant(record.tenant).store.upload_path(record.photo_sha256)
        request = replace(record.request, photo_uri=str(upload))
        job = Job(tenant=record.tenant, run_id=ON_DEMAND, epoch=0, request=request)
        self.queue.append(job, INTERACTIVE)
        self._wake.set()

    def _queue_batch(self, batch: Batch) -> None:
        for request in batch.take_requests():
            job = Job(tenant=batch.tenant, run_id=batch.run.run_id, epoch=0, request=request)
            self.queue.append(job, BATCH)
        self._wake.set()

    def _learn(self, request: RenderRequest, outcome: RowOutcome) -> None:
        if isinstance(outcome, Ok) and not outcome.reused:
            self.estimates.add(request, sum(outcome.timings.values()))

    def _repeated(self, record: VideoRecord, earlier: Entry) -> dict[str, Any] | Refused:
        """Return the earlier request of the same Idempotency-Key as it stands."""
        try:
            record.check_repeats(earlier.record)
        except RequestError as error:
            return self._refuse(422, error.code, error.message)
        return self._view(earlier)

    def _refusal(self, home: Tenant, record: VideoRecord, key: Key) -> Refused | None:
        """Return why a new request is not let in, None if it is."""
        if record.video_id in home.removing:
            return self._refuse(409, "being_deleted", "the video of this Idempotency-Key is being deleted", 2)
        if self.draining:
            return self._refuse(503, "draining", "the service is being shut down; try again later", 30)
        refused = self._over_rate(key)
        if refused is not None:
            return refused
        writing = [other.record.key_id for tenant in self.tenants.values() for other in tenant.accepting.values()]
        if len(self.active[key.key_id]) + writing.count(key.key_id) >= key.max_active:
            return self._refuse(
                429,
                "too_many_active",
                f"this key has {key.max_active} videos queued or in progress, which is its limit",
                self._one_job_s(),
            )
        if self.queue.num_interactive() + len(writing) >= self.config.max_queued:
            return self._refuse(
                429, "queue_full", f"{self.config.max_queued} requests wait, which is the limit", self._one_job_s()
            )
        return None

    def _over_rate(self, key: Key) -> Refused | None:
        now = time.monotonic()
        bucket = self.buckets.setdefault(key.key_id, Bucket(key.requests_per_minute, now))
        per_second = key.requests_per_minute / 60
        bucket.tokens = min(key.requests_per_minute, bucket.tokens + (now - bucket.filled_at) * per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return self._refuse(
                429,
                "rate_limited",
                f"this key may ask for {key.requests_per_minute} renders, checks and batches a minute",
                (1 - bucket.tokens) / per_second,
            )
        bucket.tokens -= 1
        return None

    def _refuse(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> Refused:
        self.metrics.refusals.labels(code).inc()
        return Refused(status=status, code=code, message=message, retry_after_s=retry_after_s)

    def _one_job_s(self) -> float:
        return max(1.0, (self.estimates.mean_s() or 10.0) / self.config.num_renderers)

    def _wait_s(self, num_ahead: int) -> float | None:
        """Return how long until a renderer takes the job after `num_ahead` waiting ones, in seconds."""
        if num_ahead == 0 and len(self.running) < self.config.num_renderers:
            return 0.0
        mean = self.estimates.mean_s()
        return None if mean is None else mean * (num_ahead + 1) / self.config.num_renderers

    def _eta_s(self, entry: Entry, position: int | None) -> float | None:
        request = entry.record.request
        whole = self.estimates.render_s(request)
        if entry.status == "queued":
            wait = self._wait_s(position or 0)
            return None if whole is None or wait is None else wait + whole
        if entry.status != "in_progress" or entry.started_at is None:
            return None
        now = time.monotonic()
        estimates = []
        if whole is not None:
            estimates.append(max(0.0, whole - (now - entry.started_at)))
        if entry.step and entry.stepped_at is not None:
            # This video's own pace counts where it is slower than those before it.
            estimates.append((now - entry.stepped_at) / entry.step * (entry.steps - entry.step))
        return max(estimates, default=None)

    def _view(self, entry: Entry) -> dict[str, Any]:
        """Return the video document; see the service's OpenAPI."""
        record, request, outcome = entry.record, entry.record.request, entry.outcome
        position = self.queue.position((record.tenant, ON_DEMAND, record.video_id))
        eta = self._eta_s(entry, position)
        percent = math.floor(100 * entry.step / entry.steps) if entry.steps else 0
        retention = self.config.retention_days
        return {
            "id": record.video_id,
            "object": "video",
            "model": self.config.card.name,
            "status": entry.status,
            "progress": 100 if entry.status == "completed" else min(percent, 99),
            "created_at": int(record.created_at),
            "completed_at": None if entry.ended_at is None else int(entry.ended_at),
            "expires_at": None if retention is None else int(record.created_at + retention * 86400),
            "error": error_of(outcome),
            "prompt": request.prompt,
            "seconds": f"{request.num_frames / request.fps:g}",
            "size": f"{request.width}x{request.height}",
            "remixed_from_video_id": record.remixed_from,
            "step": entry.step,
            "steps": request.num_inference_steps,
            "eta_seconds": None if eta is None else round(eta, 1),
            "queue_position": position,
            "num_frames": request.num_frames,
            "fps": request.fps,
            "seed": outcome.seed if isinstance(outcome, Ok) else request.seed,
            "tier": request.tier,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_schedule": request.guidance_schedule,
            "negative_prompt": request.negative_prompt,
            "consent_id": request.consent_id,
            "identity_lora": request.identity_lora,
            "face_similarity": outcome.face_similarity if isinstance(outcome, Ok) else None,
            "has_content": isinstance(outcome, Ok | Rejected) and outcome.video is not None,
        }

    def _close_epochs(self) -> None:
        for home in self.tenants.values():
            if home.epoch is not None:
                home.epoch.close()
                home.epoch = None
        self.batches.close()
        self._turn.close()
        self.ready = False

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the dispatcher's work has ended", exc_info=error)
            self._fatal = error


async def _turn_at(run: Ledger) -> Epoch:
    """Take the next turn at a run, once the driver before has ended."""
    while True:
        try:
            return await asyncio.to_thread(run.open_epoch)
        except EchoVideoError as error:
            if error.code != "already_running" and not isinstance(error, StorageError):
                raise
            _log.info("standing by: %s", error.code)
            await asyncio.sleep(_STANDBY_CHECK_S)


def _read_tenant(store: TenantStore) -> list[tuple[VideoRecord, RowOutcome | None, float, bool]]:
    """Return each request of a tenant with its outcome or None, when that was written, and whether it is to go."""
    folder = store.ledger.folder
    names = (folder / "requests").list_names()
    records = [VideoRecord.from_record(record) for record in (folder / "requests").read_many_json(names)]
    outcomes = store.ledger.outcomes()
    ended = {
        file.path.split("/")[0].removesuffix(".json"): file.modified_s
        for kind in ("attempts", "outcomes")
        for file in (folder / kind).list_files()
    }
    removed = set((folder / "removed").list_names())
    return [
        (
            record,
            outcomes.get(record.video_id),
            ended.get(record.video_id, 0.0),
            record.video_id in removed,
        )
        for record in sorted(records, key=lambda record: (record.created_at, record.video_id))
    ]


def _delete_strays(store: TenantStore, needed: Collection[str]) -> None:
    """Delete the photos of requests that no dispatcher lived to write."""
    for name in (store.ledger.folder / "uploads").list_names():
        photo_sha256 = name.removesuffix(".jpg")
        if photo_sha256 not in needed:
            store.upload_path(photo_sha256).delete()
            store.identity_path(photo_sha256).delete()


def _delete_request(store: TenantStore, record: VideoRecord, key: str | None, *, photo_too: bool) -> None:
    store.ledger.delete_row(record.video_id, key)
    if photo_too:
        store.upload_path(record.photo_sha256).delete()
        store.identity_path(record.photo_sha256).delete()
    store.request_path(record.video_id).delete()
    store.removed_path(record.video_id).delete()
