"""Row outcomes: how a row ended, one of five records, never an exception and never a missing row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from echovideo.video import Video


@dataclass(frozen=True, kw_only=True, slots=True)
class Ok:
    """The row's video is committed. Similarities are cosines, timings seconds; final."""

    row_id: str
    attempt: int
    video: Video
    sidecar_uri: str
    seed: int
    seeds_tried: tuple[int, ...]
    face_similarity: float | None
    detection_rate: float | None
    timings: Mapping[str, float] = field(default_factory=dict)
    reused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """The row asks for what cannot be given: bad values, a refused photo, a face below the gate. Final.

    `numbers` holds the measurements behind `message`; `video` is the best one kept when the gate refused it.
    """

    row_id: str
    code: str
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    video: Video | None = None
    sidecar_uri: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An attempt broke in `stage` through no fault of the row that we know of; the next run tries again."""

    row_id: str
    attempt: int
    stage: str
    code: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dead:
    """The row took its worker down `strikes` times; final, so that it stops costing its neighbours."""

    row_id: str
    strikes: int
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancelled:
    """The run was cancelled before this row's video was done; the next run tries again."""

    row_id: str
    attempt: int


RowOutcome = Ok | Rejected | Failed | Dead | Cancelled

KINDS: Mapping[str, type[RowOutcome]] = {
    "ok": Ok,
    "rejected": Rejected,
    "failed": Failed,
    "dead": Dead,
    "cancelled": Cancelled,
}
FINAL = (Ok, Rejected, Dead)
"""Outcomes that end a row for good; the others are attempts, which the next run retries."""


def kind_of(outcome: RowOutcome) -> str:
    """Return the outcome's word: "ok", "rejected", "failed", "dead" or "cancelled"."""
    return next(word for word, kind in KINDS.items() if isinstance(outcome, kind))


def to_record(outcome: RowOutcome) -> dict[str, Any]:
    """Return the outcome as a JSON-able dict with its word under "outcome"."""
    return {"outcome": kind_of(outcome), **asdict(outcome)}


def from_record(record: Mapping[str, Any]) -> RowOutcome:
    """Return the outcome a `to_record` dict holds; raises KeyError or TypeError on any other dict."""
    values = {name: value for name, value in record.items() if name != "outcome"}
    if values.get("video") is not None:
        values["video"] = Video(**values["video"])
    if "seeds_tried" in values:
        values["seeds_tried"] = tuple(values["seeds_tried"])
    return KINDS[record["outcome"]](**values)
