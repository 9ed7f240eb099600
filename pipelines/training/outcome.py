"""Clip outcomes: how a clip of footage ended. Only the good one is of its own kind; the others are those of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from echovideo.training.dataset import Example, Reference
from pipelines.ledger import OutcomeLedger
from pipelines.outcome import Dead, Failed, Rejected, from_record, to_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The clip's shard is written; final. Its rows of the dataset's tables, what was counted, and seconds a part took.

    `warning` is "" or `one_clip`: nobody else's clip group shows the person, so cross-clip training refuses the
    dataset. It depends on the other clips, so it is set when the dataset is published and the ledger does not hold it.
    """

    row_id: str
    attempt: int
    example: Example
    references: tuple[Reference, ...]
    shots: int
    face_frames: int
    footage_sha256: str
    timings: Mapping[str, float] = field(default_factory=dict)
    warning: str = ""


ClipOutcome = Prepared | Rejected | Failed | Dead


class ClipLedger(OutcomeLedger[ClipOutcome]):
    """The ledger of a dataset in the making; `sheets/` holds a picture of each clip."""

    pictures = ("sheets",)

    def encode(self, outcome: ClipOutcome) -> dict[str, Any]:
        """Return the outcome as a JSON-able dict with its word under "outcome"; Prepared's is "ok"."""
        return {"outcome": "ok", **asdict(outcome)} if isinstance(outcome, Prepared) else to_record(outcome)

    def decode(self, record: Mapping[str, Any]) -> ClipOutcome:
        """Return the outcome that an `encode` dict holds."""
        if record["outcome"] != "ok":
            outcome = from_record(record)
            assert isinstance(outcome, Rejected | Failed | Dead)
            return outcome
        values = {name: value for name, value in record.items() if name != "outcome"}
        values["example"] = Example(**values["example"])
        values["references"] = tuple(Reference(**reference) for reference in values["references"])
        return Prepared(**values)
