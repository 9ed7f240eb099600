"""What every stage does around its own work: pass on ended rows, claim, give up on killers, end with an outcome."""

from __future__ import annotations

import copy
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import ray
from numpy.typing import NDArray

from echovideo.errors import RenderCancelledError
from echovideo.request import RenderRequest
from echovideo.training.adapters import AdapterSlot
from echovideo.video import poster_jpeg
from pipelines.config import RunConfig
from pipelines.identities import Identities, IdentityCard
from pipelines.ledger import MAX_STRIKES, Claim, Ledger
from pipelines.outcome import Cancelled, Dead, RowOutcome
from pipelines.stages.row import Row, outcome_of_error

_CANCEL_CHECK_S = 2.0


class Stage(ABC):
    """An actor of the graph. Subclasses load their networks in __init__ and do one row's work in `work`.

    `work` is called on up to `calls_at_once` threads. A row that a worker died under is worked on alone, so that if
    it kills the worker again, no neighbour dies with it.
    """

    name: ClassVar[str]
    calls_at_once: ClassVar[int] = 1

    def __init__(self, config: RunConfig, epoch: int) -> None:
        self.config = config
        self.epoch = epoch
        self.ledger = Ledger(config.output_path, config.run_id)
        self.node = ray.get_runtime_context().get_node_id()
        self._seats = threading.Semaphore(self.calls_at_once)
        self._taking_all_seats = threading.Lock()
        self._cancel_seen = (0.0, False)

    def for_run(self, config: RunConfig, epoch: int) -> Self:
        """Return this stage at work for another run of the same model, with the same networks."""
        other = copy.copy(self)
        other.config = config
        other.epoch = epoch
        other.ledger = Ledger(config.output_path, config.run_id)
        other._cancel_seen = (0.0, False)
        return other

    @abstractmethod
    def work(self, row: Row, claim: Claim) -> Row:
        """Return the row one step further, or ended with its outcome; what it raises becomes the row's outcome."""

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Take one row of the graph and return it, one step further or ended."""
        return self.take(Row.from_columns(columns)).to_columns()

    def take(self, row: Row) -> Row:
        """Return the row one step further, or ended; a row that ended before is passed on."""
        return self._claimed_work(row) if row.outcome is None else row

    def cancelled(self) -> bool:
        """Return whether the run's cancellation was asked for, as seen at most two seconds ago."""
        checked, seen = self._cancel_seen
        if not seen and time.monotonic() - checked > _CANCEL_CHECK_S:
            seen = self.ledger.cancel_requested()
            self._cancel_seen = (time.monotonic(), seen)
        return seen

    def keep_picture(self, kind: str, row: Row, pixels_HWC: NDArray[np.uint8]) -> None:
        """Keep a small picture of the row, for the report, in the run's own prefix."""
        (self.ledger.folder / kind / f"{row.request.row_id}.jpg").write_bytes(poster_jpeg(pixels_HWC))

    def _claimed_work(self, row: Row) -> Row:
        row_id = row.request.row_id
        claim = None
        while claim is None:
            claim = self.ledger.claim(row_id, self.epoch, self.name, self.node, _node_alive)
        if not isinstance(claim, Claim):
            return row.ended(claim)
        if self.cancelled():
            return self._end(row, Cancelled(row_id=row_id, attempt=claim.attempt))
        if claim.strikes >= MAX_STRIKES:
            message = (
                f"this row took its worker down {claim.strikes} times in the {self.name} stage; "
                "it was given up so that the others go on"
            )
            return self._end(row, Dead(row_id=row_id, strikes=claim.strikes, message=message))
        with self._seat(alone=claim.strikes > 0):
            started = time.perf_counter()
            try:
                worked = self.work(row, claim)
            except RenderCancelledError:
                return self._end(row, Cancelled(row_id=row_id, attempt=claim.attempt))
            except Exception as error:
                # An outcome, never an exception, leaves a stage: Ray would end the whole run for one row's exception.
                return self._end(row, outcome_of_error(error, row_id, self.name, claim.attempt))
        if worked.outcome is not None:
            return self._end(worked, worked.outcome)
        return replace(worked, timings={**worked.timings, self.name: time.perf_counter() - started})

    def _end(self, row: Row, outcome: RowOutcome) -> Row:
        return row.ended(self.ledger.commit(outcome, self.epoch))

    @contextmanager
    def _seat(self, *, alone: bool) -> Iterator[None]:
        if not alone:
            with self._seats:
                yield
            return
        with self._taking_all_seats, ExitStack() as taken:
            for _ in range(self.calls_at_once):
                taken.enter_context(self._seats)
            yield


def identity_of(config: RunConfig, request: RenderRequest) -> IdentityCard | None:
    """Return the card of the identity that a request names."""
    return None if request.identity_lora is None else config.identities[request.identity_lora]


def put_identity(slot: AdapterSlot, config: RunConfig, request: RenderRequest) -> None:
    """Have the adapter of the identity that a request names in a model, or none; raises as `Identities.load`."""
    card = identity_of(config, request)
    if card is None:
        slot.clear()
    else:
        slot.hold(card.sha256, lambda: Identities(config.output_path).load(card), config.model_digest)


def _node_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
