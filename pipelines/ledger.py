"""The ledger: the one truth of a run, as small files written at most once on a local folder or S3.

Layout under the output root, one owner's namespace:

    videos/<key[:2]>/<key>-<sha256[:16]>.mp4    a rendered video; its name holds its own digest
    videos/<key[:2]>/<key>.json                 sidecar, written last and only if absent: the video is complete
    runs/<run_id>/run.json                      what the run was asked to do
    runs/<run_id>/epochs/<n>.json               a driver's turn; <n>.heartbeat while it lives, <n>.finished at its end
    runs/<run_id>/claims/<row_id>/<attempt>.json    written by a stage before its work on the row
    runs/<run_id>/attempts/<row_id>/<attempt>.json  Failed and Cancelled: the next run tries again
    runs/<run_id>/outcomes/<row_id>.json        Ok, Rejected and Dead: final, written only if absent
    runs/<run_id>/videos/<key>                  this run refers to the video of that key
    runs/<run_id>/identities/                   identities by photo digest
    runs/<run_id>/photos/, faces/, posters/     small pictures by row; sheets/ of a data job, by clip
    runs/<run_id>/cancel, deleting              markers

A row: claim -> find or render and put the video -> commit. Whoever claims or commits names its driver's epoch and is
refused once a newer driver has taken over. Times are compared by the store's own clock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from echovideo.errors import RunError, StorageError
from pipelines.outcome import KINDS, Cancelled, Failed, RowOutcome, from_record, to_record
from pipelines.storage import StoragePath, StoredFile, encode_json

LEASE_S = 30.0
"""A driver without a heartbeat for this long is taken to be gone."""
HEARTBEAT_S = 5.0
MAX_STRIKES = 3
"""A row that took its worker down this often is Dead."""

_log = logging.getLogger(__name__)


class StaleDriverError(RunError):
    """A newer driver has taken the run over; the caller must stop, its work is not wanted any more."""

    code = "stale_driver"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The durable word that `stage` on `node` works on attempt `attempt` (from 1) of a row, under driver `epoch`.

    `strikes` counts the earlier claims that the row itself must have ended; `token` is this claim's alone.
    """

    row_id: str
    attempt: int
    epoch: int
    stage: str
    node: str
    strikes: int
    token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredVideo:
    """A complete video of the namespace: its address, its sidecar's address, and what the sidecar says.

    Beside the renderer's own entries, `sidecar` holds "file" (the MP4's name beside it), "sha256" and "num_bytes".
    """

    uri: str
    sidecar_uri: str
    sidecar: Mapping[str, Any]


def run_id_for(manifest_digest: str, settings: Mapping[str, Any]) -> str:
    """Return the run's id: 16 hex digits of the SHA-256 of the manifest's digest and JSON-able settings."""
    return hashlib.sha256(encode_json({"manifest": manifest_digest, "settings": dict(settings)})).hexdigest()[:16]


def next_strikes(previous: Claim, *, epoch: int, stage: str, ended: bool, node_alive: bool) -> int:
    """Return the strikes of the claim after `previous`.

    One more only if the same stage takes the row again, under the same driver, while the earlier node still lives and
    left no record: then nothing but the row itself can have taken the worker down. A claim by a later stage means
    that the earlier one was done.
    """
    replayed = not ended and previous.epoch == epoch and previous.stage == stage and node_alive
    return previous.strikes + replayed


class Epoch:
    """A driver's turn at a run, a context manager: its heartbeat is kept up until it is closed."""

    def __init__(self, number: int, folder: StoragePath, heartbeat_s: float) -> None:
        self.number = number
        self._folder = folder
        self._heartbeat_s = heartbeat_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{number}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the turn: the next driver may start at once."""
        self._closing.set()
        self._thread.join()
        (self._folder / f"{self.number}.finished").write_bytes(b"")

    def __enter__(self) -> Epoch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_s):
            try:
                (self._folder / f"{self.number}.heartbeat").write_bytes(b"")
            except StorageError as error:
                # A store that is away for a moment must not end the turn; the fence guards every commit anyway.
                _log.warning("heartbeat of epoch %d not written: %s", self.number, error)


class HasRowId(Protocol):
    """What every outcome has."""

    @property
    def row_id(self) -> str:
        """The row whose outcome it is."""
        ...


Outcome = TypeVar("Outcome", bound=HasRowId)


class OutcomeLedger(ABC, Generic[Outcome]):
    """One run's turns, claims and outcomes under an output root; see the module for layout and protocol.

    A subclass says what its outcomes are. Failed and Cancelled are attempts, every other outcome is final. It pickles
    as its addresses and may be used by many threads and processes at once.
    """

    pictures: ClassVar[tuple[str, ...]]
    """Folders of the run's small pictures, one JPEG a row in each."""

    @abstractmethod
    def encode(self, outcome: Outcome) -> dict[str, Any]:
        """Return the outcome as a JSON-able dict with its word under "outcome"."""

    @abstractmethod
    def decode(self, record: Mapping[str, Any]) -> Outcome:
        """Return the outcome that an `encode` dict holds."""

    def __init__(
        self, root: StoragePath, run_id: str, *, lease_s: float = LEASE_S, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self.root = root
        self.run_id = run_id
        self.lease_s = lease_s
        self.heartbeat_s = heartbeat_s
        # Final outcomes never change, so each is read once.
        self._finals: dict[str, Outcome] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _open_ledger, (type(self), self.root, self.run_id, self.lease_s, self.heartbeat_s)

    @property
    def folder(self) -> StoragePath:
        """The run's own prefix; everything in it goes when the run is deleted."""
        return self.root / "runs" / self.run_id

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Record what the run was asked to do; a later turn may be asked to do it elsewhere, or wider."""
        (self.folder / "run.json").write_json(dict(config))

    def read_config(self) -> dict[str, Any]:
        """Return what the run was asked to do; raises NotFoundError for a run that never started."""
        config: dict[str, Any] = (self.folder / "run.json").read_json()
        return config

    def open_epoch(self, host: str | None = None, pid: int | None = None) -> Epoch:
        """Take the run over for the driver `pid` on `host` (default: this process); use as a context manager.

        Raises RunError `already_running`, naming host, pid and age, while another driver lives: its last heartbeat is
        younger than the lease, and it is not a process of this machine that has ended. Raises `being_deleted` for a
        run whose deletion was begun.
        """
        if (self.folder / "deleting").exists():
            raise RunError(f"run {self.run_id} is being deleted; finish that first", code="being_deleted")
        newest = self._check_idle()
        pid = os.getpid() if pid is None else pid
        record = {
            "host": host or socket.gethostname(),
            "pid": pid,
            "machine": _machine(),
            "process_start": _process_start(pid),
            "token": secrets.token_hex(8),
        }
        number = newest + 1
        if not (self._epochs / f"{number}.json").write_json_if_absent(record):
            raise RunError(
                f"run {self.run_id} was taken over this moment by another driver; follow that one",
                code="already_running",
            )
        return Epoch(number, self._epochs, self.heartbeat_s)

    def is_driven(self) -> bool:
        """Return whether a driver lives that works on the run."""
        try:
            self._check_idle()
        except RunError:
            return True
        return False

    def is_open(self) -> bool:
        """Return whether the newest turn was not closed: its driver is at work, or was lost with work in hand."""
        names = self._epochs.list_names()
        return _newest(names) > 0 and f"{_newest(names)}.finished" not in names

    def claim(
        self, row_id: str, epoch: int, stage: str, node: str, node_alive: Callable[[str], bool]
    ) -> Claim | Outcome | None:
        """Record that `stage` on `node` starts to work on a row, before it does.

        Returns the row's outcome instead if it has a final one, and None if another worker claimed this attempt at the
        same moment. `node_alive` tells whether the node of an earlier claim still lives. The caller commits Dead
        instead of working when `strikes` has reached MAX_STRIKES. Raises StaleDriverError.
        """
        self._check_fence(epoch)
        if (self._outcomes / f"{row_id}.json").exists():
            return self.decode((self._outcomes / f"{row_id}.json").read_json())
        claims = self.folder / "claims" / row_id
        last = max((int(name.removesuffix(".json")) for name in claims.list_names()), default=0)
        strikes = 0
        if last:
            previous = Claim(**(claims / f"{last}.json").read_json())
            strikes = next_strikes(
                previous,
                epoch=epoch,
                stage=stage,
                ended=(self._attempts / row_id / f"{last}.json").exists(),
                node_alive=node_alive(previous.node),
            )
        claim = Claim(
            row_id=row_id,
            attempt=last + 1,
            epoch=epoch,
            stage=stage,
            node=node,
            strikes=strikes,
            token=secrets.token_hex(8),
        )
        written = (claims / f"{claim.attempt}.json").write_json_if_absent(asdict(claim))
        return claim if written else None

    def commit(self, outcome: Outcome, epoch: int) -> Outcome:
        """Record how a row (final outcomes) or an attempt (Failed, Cancelled) ended, once.

        Returns the record that stands: `outcome`, or the earlier one when somebody was first. A row cancelled before
        any claim has attempt 0. Raises StaleDriverError when a newer driver has taken over.
        """
        self._check_fence(epoch)
        if isinstance(outcome, Failed | Cancelled):
            path = self._attempts / outcome.row_id / f"{outcome.attempt}.json"
        else:
            path = self._outcomes / f"{outcome.row_id}.json"
        if path.write_json_if_absent(self.encode(outcome)):
            return outcome
        return self.decode(path.read_json())

    def outcomes(self) -> dict[str, Outcome]:
        """Return how each row that has a record stands: its final outcome, else its latest attempt's."""
        done = self._final_row_ids()
        unread = [row_id for row_id in done if row_id not in self._finals]
        self._finals.update(self._read(self._outcomes, {row_id: f"{row_id}.json" for row_id in unread}))
        latest: dict[str, int] = {}
        for file in self._attempts.list_files():
            row_id, attempt = file.path.removesuffix(".json").split("/")
            if row_id not in done:
                latest[row_id] = max(latest.get(row_id, 0), int(attempt))
        attempts = self._read(self._attempts, {row_id: f"{row_id}/{n}.json" for row_id, n in latest.items()})
        return {row_id: self._finals[row_id] for row_id in done} | attempts

    def counts(self) -> dict[str, int]:
        """Return how many rows stand at each of "ok", "rejected", "failed", "dead" and "cancelled"."""
        counted = Counter(self.encode(outcome)["outcome"] for outcome in self.outcomes().values())
        return {kind: counted[kind] for kind in KINDS}

    def remaining(self, row_ids: Iterable[str]) -> list[str]:
        """Return those of `row_ids`, in order, that have no final outcome yet."""
        done = self._final_row_ids()
        return [row_id for row_id in row_ids if row_id not in done]

    def request_cancel(self) -> None:
        """Ask the run's driver, now and in later turns, to stop."""
        (self.folder / "cancel").write_bytes(b"")

    def withdraw_cancel(self) -> None:
        """Take a request to cancel back, so that the run can be resumed."""
        (self.folder / "cancel").delete()

    def cancel_requested(self) -> bool:
        """Return whether the run is to stop."""
        return (self.folder / "cancel").exists()

    def forget_row(self, row_id: str) -> None:
        """Delete a row's records and pictures, as its run's driver; stopped half-way, it can be called again."""
        for kind in self.pictures:
            (self.folder / kind / f"{row_id}.jpg").delete()
        (self._outcomes / f"{row_id}.json").delete()
        self._finals.pop(row_id, None)
        for folder in (self._attempts / row_id, self.folder / "claims" / row_id):
            folder.delete_tree()

    @property
    def _epochs(self) -> StoragePath:
        return self.folder / "epochs"

    @property
    def _outcomes(self) -> StoragePath:
        return self.folder / "outcomes"

    @property
    def _attempts(self) -> StoragePath:
        return self.folder / "attempts"

    def _final_row_ids(self) -> set[str]:
        return {name.removesuffix(".json") for name in self._outcomes.list_names()}

    def _read(self, folder: StoragePath, names: Mapping[str, str]) -> dict[str, Outcome]:
        records = folder.read_many_json(list(names.values()))
        return {row_id: self.decode(record) for row_id, record in zip(names, records, strict=True)}

    def _check_fence(self, epoch: int) -> None:
        # Epochs are numbered without gaps, so the next one is there if any newer one is.
        if (self._epochs / f"{epoch + 1}.json").exists():
            raise StaleDriverError(
                f"run {self.run_id} was taken over by a newer driver than epoch {epoch}; stop this one"
            )

    def _check_idle(self) -> int:
        """Return the newest epoch's number, 0 if there is none; raises RunError if its driver lives."""
        files = {file.path: file for file in self._epochs.list_files()}
        newest = _newest(files)
        if not newest or f"{newest}.finished" in files:
            return newest
        driver = (self._epochs / f"{newest}.json").read_json()
        is_local = driver["machine"] is not None and driver["machine"] == _machine()
        if is_local and _process_start(driver["pid"]) != driver["process_start"]:
            return newest
        age = self._store_time() - _last_sign(newest, files)
        if age > self.lease_s:
            return newest
        raise RunError(
            f"run {self.run_id} is already running on host {driver['host']}, process {driver['pid']}, last heard of "
            f"{max(age, 0.0):.0f} s ago; follow it, or cancel it, or wait until it is silent for {self.lease_s:g} s",
            code="already_running",
            numbers={"pid": driver["pid"], "age_s": age},
        )

    def _store_time(self) -> float:
        probe = self.folder / "clock"
        probe.write_bytes(b"")
        return probe.stat().modified_s


def _newest(names: Iterable[str]) -> int:
    """Return the newest epoch of those whose files these are, 0 if there is none."""
    return max((int(name.removesuffix(".json")) for name in names if name.endswith(".json")), default=0)


class Ledger(OutcomeLedger[RowOutcome]):
    """A run of videos: rows end with RowOutcomes, and their videos are shared by all runs of the namespace."""

    pictures = ("photos", "faces", "posters")

    def encode(self, outcome: RowOutcome) -> dict[str, Any]:
        """Return the outcome as a JSON-able dict with its word under "outcome"."""
        return to_record(outcome)

    def decode(self, record: Mapping[str, Any]) -> RowOutcome:
        """Return the outcome that an `encode` dict holds."""
        return from_record(record)

    def find_video(self, key: str) -> StoredVideo | None:
        """Return the namespace's complete video of that key, which this run then refers to, or None.

        `key` is the hex digest of all that decides the pixels.
        """
        self._refer(key)
        path = self._sidecar(key)
        if not path.exists():
            return None
        return self._stored(path, path.read_json())

    def put_video(self, key: str, mp4: Path, sidecar: Mapping[str, Any]) -> StoredVideo:
        """Store a video and its JSON-able sidecar under `key`, and return the one that stands.

        The MP4 is uploaded, read back and its digest compared before the sidecar appears. When another worker stored a
        video of that key first, that one is returned and ours is removed. Raises StorageError `damaged_upload`.
        """
        self._refer(key)
        path = self._sidecar(key)
        with mp4.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        target = path.parent / f"{key}-{digest[:16]}.mp4"
        target.upload_file(mp4)
        stored = hashlib.sha256(target.read_bytes()).hexdigest()
        if stored != digest:
            raise StorageError(
                f"{target} reads back with SHA-256 {stored}, but {digest} was written; check the store",
                code="damaged_upload",
            )
        record = {**sidecar, "file": target.name, "sha256": digest, "num_bytes": mp4.stat().st_size}
        if not path.write_json_if_absent(record):
            record = path.read_json()
            if record["file"] != target.name:
                target.delete()
        return self._stored(path, record)

    def delete_run(self) -> None:
        """Delete the run, and each video it refers to that no other run refers to.

        Other runs that are being deleted do not count, so that a shared video goes with the last of them. Stopped
        half-way, it can be called again. Raises RunError `already_running`.
        """
        self._check_idle()
        (self.folder / "deleting").write_bytes(b"")
        self._delete_videos(set((self.folder / "videos").list_names()))
        # Without these two nobody would know that there is a run, and a deletion to finish.
        for name in sorted(set(self.folder.list_names()) - {"run.json", "deleting"}):
            (self.folder / name).delete_tree()
            (self.folder / name).delete()
        self.folder.delete_tree()

    def delete_row(self, row_id: str, video_key: str | None) -> None:
        """Delete a row's records and pictures, as its run's driver; stopped half-way, it can be called again.

        `video_key` names the video that no other row of this run asks for, None if another one does; it is deleted
        unless another run refers to it.
        """
        if video_key is not None:
            (self.folder / "videos" / video_key).delete()
            self._delete_videos({video_key})
        self.forget_row(row_id)

    def _sidecar(self, key: str) -> StoragePath:
        return self.root / "videos" / key[:2] / f"{key}.json"

    def _stored(self, path: StoragePath, sidecar: Mapping[str, Any]) -> StoredVideo:
        return StoredVideo(uri=str(path.parent / sidecar["file"]), sidecar_uri=str(path), sidecar=sidecar)

    def _refer(self, key: str) -> None:
        # Before the video is looked for or written, so that another run's deletion sees it in time.
        (self.folder / "videos" / key).write_bytes(b"")

    def _delete_videos(self, keys: set[str]) -> None:
        """Delete those of the videos that no other run refers to."""
        for run_id in (self.root / "runs").list_names():
            other = self.root / "runs" / run_id
            if run_id != self.run_id and not (other / "deleting").exists():
                keys = keys - set((other / "videos").list_names())
        for key in sorted(keys):
            sidecar = self._sidecar(key)
            # The sidecar goes first: without it the video does not count as complete.
            sidecar.delete()
            for name in sidecar.parent.list_names():
                if name.startswith(f"{key}-"):
                    (sidecar.parent / name).delete()


def _open_ledger(
    kind: type[OutcomeLedger[Any]], root: StoragePath, run_id: str, lease_s: float, heartbeat_s: float
) -> OutcomeLedger[Any]:
    return kind(root, run_id, lease_s=lease_s, heartbeat_s=heartbeat_s)


def _last_sign(epoch: int, files: Mapping[str, StoredFile]) -> float:
    return max(files[name].modified_s for name in (f"{epoch}.json", f"{epoch}.heartbeat") if name in files)


def _machine() -> str | None:
    """Name this boot of this machine and its process numbering, so that a pid means the same; None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, so that a reused pid is not mistaken for it.

    None if it has ended.
    """
    try:
        # The process's name, in parentheses, may hold anything; the fields after it are plain (proc(5)).
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
