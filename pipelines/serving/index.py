"""The dispatcher's index: what each request is doing now, in memory, rebuilt from the records at every start."""

from __future__ import annotations

import asyncio
import bisect
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from echovideo.request import RenderRequest
from pipelines.outcome import Dead, Failed, Ok, Rejected, RowOutcome
from pipelines.serving.records import Job, VideoRecord

Status = Literal["queued", "in_progress", "completed", "failed"]
Order = Literal["asc", "desc"]

INTERACTIVE, BATCH = 0, 1
"""Classes of jobs, the first to be taken first."""


@dataclass(slots=True, eq=False)
class Entry:
    """One request as it stands. `version` counts its changes; times are the loop's, `ended_at` seconds since 1970."""

    record: VideoRecord
    status: Status = "queued"
    outcome: RowOutcome | None = None
    ended_at: float | None = None
    step: int = 0
    steps: int = 0
    started_at: float | None = None
    stepped_at: float | None = None
    preview: bytes | None = None
    preview_version: int = 0
    version: int = 1
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        """Wake whoever waits for this entry to change."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self, outcome: RowOutcome, ended_at: float) -> None:
        """Take the outcome in."""
        self.outcome, self.ended_at = outcome, ended_at
        self.status = "completed" if isinstance(outcome, Ok) else "failed"
        self.step = self.record.request.num_inference_steps if isinstance(outcome, Ok) else 0
        self.preview = None
        self.change()


class Entries:
    """One tenant's entries by id, and in the order they were made."""

    def __init__(self) -> None:
        self._by_id: dict[str, Entry] = {}
        self._order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_id.values())

    def get(self, video_id: str) -> Entry | None:
        """Return the entry of that id, None if there is none."""
        return self._by_id.get(video_id)

    def add(self, entry: Entry) -> None:
        """Take a new entry in."""
        self._by_id[entry.record.video_id] = entry
        bisect.insort(self._order, _place(entry.record))

    def remove(self, video_id: str) -> Entry | None:
        """Take an entry out and return it, None if there is none."""
        entry = self._by_id.pop(video_id, None)
        if entry is not None:
            del self._order[bisect.bisect_left(self._order, _place(entry.record))]
        return entry

    def page(self, *, limit: int, after: str | None, order: Order) -> tuple[list[Entry], bool]:
        """Return up to `limit` entries after the one named, and whether there are more; raises KeyError for `after`."""
        if order == "asc":
            start = 0 if after is None else bisect.bisect_right(self._order, _place(self._by_id[after].record))
            chosen = self._order[start : start + limit + 1]
        else:
            stop = (
                len(self._order)
                if after is None
                else bisect.bisect_left(self._order, _place(self._by_id[after].record))
            )
            chosen = self._order[max(0, stop - limit - 1) : stop][::-1]
        return [self._by_id[video_id] for _, video_id in chosen[:limit]], len(chosen) > limit


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A job's place in the queue: by class, then by turn; a job that goes back keeps its place."""

    priority: int
    turn: int


class Queue:
    """Jobs that wait, the first to be taken first."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._jobs: dict[Place, Job] = {}
        self._place_of: dict[tuple[str, str, str], Place] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._places)

    def num_interactive(self) -> int:
        """Return how many single requests wait."""
        return bisect.bisect_left(self._places, Place(BATCH, 0))

    def append(self, job: Job, priority: int) -> None:
        """Put a job behind the others of its class."""
        self._turn += 1
        self.put(job, Place(priority, self._turn))

    def put(self, job: Job, place: Place) -> None:
        """Put a job at a place it had."""
        bisect.insort(self._places, place)
        self._jobs[place] = job
        self._place_of[job.name] = place

    def pop(self) -> tuple[Job, Place]:
        """Take the first job; raises IndexError."""
        place = self._places.pop(0)
        job = self._jobs.pop(place)
        del self._place_of[job.name]
        return job, place

    def remove(self, name: tuple[str, str, str]) -> Job | None:
        """Take a job out, None if it does not wait."""
        place = self._place_of.pop(name, None)
        if place is None:
            return None
        del self._places[bisect.bisect_left(self._places, place)]
        return self._jobs.pop(place)

    def position(self, name: tuple[str, str, str]) -> int | None:
        """Return how many jobs will be taken before this one, None if it does not wait."""
        place = self._place_of.get(name)
        return None if place is None else bisect.bisect_left(self._places, place)


class Estimates:
    """How long renders take, from those that ended lately."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, ...], deque[float]] = {}
        self._per_unit: deque[float] = deque(maxlen=32)
        self._all: deque[float] = deque(maxlen=32)

    def add(self, request: RenderRequest, seconds: float) -> None:
        """Take in how long a request took its renderer."""
        self._seconds.setdefault(_shape(request), deque(maxlen=8)).append(seconds)
        self._per_unit.append(seconds / _units(request))
        self._all.append(seconds)

    def render_s(self, request: RenderRequest) -> float | None:
        """Return how long the request should take, None while nothing is known."""
        if same := self._seconds.get(_shape(request)):
            return statistics.median(same)
        return statistics.median(self._per_unit) * _units(request) if self._per_unit else None

    def mean_s(self) -> float | None:
        """Return how long requests took of late, None while nothing is known."""
        return statistics.fmean(self._all) if self._all else None


def error_of(outcome: RowOutcome | None) -> dict[str, Any] | None:
    """Return the typed error of an outcome that gave no video to be shown as one, None for the others."""
    match outcome:
        case Rejected():
            return {"code": outcome.code, "message": outcome.message, "numbers": dict(outcome.numbers)}
        case Failed():
            return {"code": outcome.code, "message": outcome.message, "numbers": {}}
        case Dead():
            return {"code": "dead", "message": outcome.message, "numbers": {"strikes": outcome.strikes}}
        case _:
            return None


def _place(record: VideoRecord) -> tuple[float, str]:
    return record.created_at, record.video_id


def _shape(request: RenderRequest) -> tuple[int, ...]:
    return (*request.bucket, request.num_inference_steps, request.tries)


def _units(request: RenderRequest) -> int:
    return request.height * request.width * request.num_frames * request.num_inference_steps
