"""All stages of a row as one, for a renderer that holds all of a model's networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self, TypeAlias

from echovideo.engine import KeepGoing
from echovideo.errors import RenderCancelledError
from pipelines.config import RunConfig
from pipelines.ledger import Claim
from pipelines.outcome import RowOutcome
from pipelines.serving.records import Job
from pipelines.stages.render import RenderStage
from pipelines.stages.row import Row, outcome_of_error
from pipelines.stages.stage import Stage

PREVIEW_EVERY_S = 0.5

Report: TypeAlias = Callable[[int, int, bytes | None], bool]
"""Told, before each step, of the steps done, the steps in all and now and then a preview; answers whether to go on."""


class WholePath(Stage):
    """Takes a row through its stages under one claim."""

    name = "service"

    def __init__(self, run: RunConfig, epoch: int, stages: Sequence[type[Stage]]) -> None:
        super().__init__(run, epoch)
        self.stages = [stage(run, epoch) for stage in stages]

    def render(self, job: Job, run: RunConfig, report: Report) -> RowOutcome:
        """Return how a job of a run ended: committed now, or found to have ended before."""
        drawn_at = 0.0

        def watch(step: int, steps: int, draw: Callable[[], bytes]) -> bool:
            nonlocal drawn_at
            preview = None
            if step > 0 and time.monotonic() - drawn_at > PREVIEW_EVERY_S:
                preview, drawn_at = draw(), time.monotonic()
            return report(step, steps, preview)

        # From here on it is in progress, and no more queued.
        report(0, job.request.num_inference_steps, None)
        outcome = self._for_job(run, job.epoch, watch).take(Row(request=job.request)).outcome
        assert outcome is not None
        return outcome

    def _for_job(self, run: RunConfig, epoch: int, watch: KeepGoing) -> Self:
        """Return the path at work for one row of a run; `watch` is told of each step and may stop it."""
        other = self.for_run(run, epoch)
        other.stages = [stage.for_run(run, epoch) for stage in self.stages]
        for stage in other.stages:
            if isinstance(stage, RenderStage):
                stage.watch = watch
        return other

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
