"""All stages of a row as one, for a renderer that holds all of a model's networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from echovideo.engine import KeepGoing
from echovideo.errors import RenderCancelledError
from echovideo.request import RenderRequest
from pipelines.config import RunConfig
from pipelines.ledger import Claim
from pipelines.outcome import RowOutcome
from pipelines.stages.render import RenderStage
from pipelines.stages.row import Row, outcome_of_error
from pipelines.stages.stage import Stage


class WholePath(Stage):
    """Takes a row through its stages under one claim."""

    name = "service"

    def __init__(self, run: RunConfig, epoch: int, stages: Sequence[type[Stage]]) -> None:
        super().__init__(run, epoch)
        self.stages = [stage(run, epoch) for stage in stages]

    def for_job(self, run: RunConfig, epoch: int, watch: KeepGoing) -> Self:
        """Return the path at work for one row of a run; `watch` is told of each step and may stop it."""
        other = self.for_run(run, epoch)
        other.stages = [stage.for_run(run, epoch) for stage in self.stages]
        for stage in other.stages:
            if isinstance(stage, RenderStage):
                stage.watch = watch
        return other

    def outcome_of(self, request: RenderRequest) -> RowOutcome:
        """Return how the request ended: committed now, or found to have ended before."""
        outcome = self.take(Row(request=request)).outcome
        assert outcome is not None
        return outcome

    def work(self, row: Row, claim: Claim) -> Row:
        """Return the row ended."""
        for stage in self.stages:
            started = time.perf_counter()
            try:
                row = stage.work(row, claim)
            except RenderCancelledError:
                raise
            except Exception as error:
                # Caught here and not by the shell around all stages, so that the outcome names the one that broke.
                return row.ended(outcome_of_error(error, row.request.row_id, stage.name, claim.attempt))
            if row.outcome is not None:
                return row
            row = replace(row, timings={**row.timings, stage.name: time.perf_counter() - started})
        raise AssertionError("a row left the last stage without an outcome")
