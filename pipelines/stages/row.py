"""The row that travels between stages: a request, what has been made of it so far, or how it already ended."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from echovideo.errors import EchoVideoError, PhotoRefusedError, RequestError
from echovideo.request import RenderRequest
from pipelines.outcome import Failed, Rejected, RowOutcome, from_record, to_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row between two stages; once `outcome` is set, later stages pass it on untouched.

    `identity` and `condition` are the records' own bytes (under 1 MB, about 4 MB), `timings` the seconds each stage
    has taken so far.
    """

    request: RenderRequest
    identity: bytes | None = None
    condition: bytes | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    outcome: RowOutcome | None = None

    def to_columns(self) -> dict[str, Any]:
        """Return the row as one Ray Data row."""
        return {
            "request": pickle.dumps(self.request),
            "identity": self.identity,
            "condition": self.condition,
            "timings": json.dumps(dict(self.timings)),
            "outcome": None if self.outcome is None else json.dumps(to_record(self.outcome)),
        }

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> Self:
        """Return the row of `to_columns`."""
        outcome = columns["outcome"]
        return cls(
            request=pickle.loads(columns["request"]),
            identity=columns["identity"],
            condition=columns["condition"],
            timings=json.loads(columns["timings"]),
            outcome=None if outcome is None else from_record(json.loads(outcome)),
        )

    def ended(self, outcome: RowOutcome) -> Row:
        """Return the row with its outcome, and without the bytes nobody will read."""
        return replace(self, identity=None, condition=None, outcome=outcome)


def outcome_of_error(error: Exception, row_id: str, stage: str, attempt: int) -> Rejected | Failed:
    """Return the outcome an exception stands for: a fault of the photo or the request is final, others are retried."""
    if isinstance(error, PhotoRefusedError | RequestError):
        return Rejected(row_id=row_id, code=error.code, message=error.message, numbers=error.numbers)
    code = error.code if isinstance(error, EchoVideoError) else _code_of(error)
    return Failed(
        row_id=row_id,
        attempt=attempt,
        stage=stage,
        code=code,
        message=str(error) or type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
    )


def _code_of(error: Exception) -> str:
    return "out_of_memory" if type(error).__name__ in ("OutOfMemoryError", "MemoryError") else "unexpected"
