"""A renderer: one replica with all of a model's networks, which takes one job at a time."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.config import RunConfig
from pipelines.outcome import to_record
from pipelines.serving.config import ServiceConfig
from pipelines.serving.records import Job

if TYPE_CHECKING:
    from pipelines.stages.stage import Stage

_REPORT_TIMEOUT_S = 10.0
_NICE = 10

_log = logging.getLogger(__name__)


class Renderer:
    """Takes a job through identity, condition and render, under one claim, and tells the dispatcher of each step.

    One claim for all of it, because a job whose worker died starts again at the first stage: claims of the earlier
    stages in between would hide the strike.
    """

    def __init__(self, config: ServiceConfig, load_stages: Callable[[], Sequence[type[Stage]]]) -> None:
        # Imported here because torch takes seconds to load and only this replica needs it.
        from pipelines.serving.path import WholePath

        # Networks on the CPU take all of it that they get; whoever asks, polls or uploads is answered first.
        os.nice(_NICE)
        self.config = config
        self.path = WholePath(config.on_demand("any"), epoch=0, stages=load_stages())
        self.dispatcher: DeploymentHandle[Any] = serve.get_deployment_handle(
            "Dispatcher", serve.get_replica_context().app_name
        )

    async def render(self, job: Job, run: RunConfig) -> dict[str, Any]:
        """Return the record of how the job ended, with what this process has in memory under "memory"."""
        return await asyncio.to_thread(self._render, job, run)

    def _render(self, job: Job, run: RunConfig) -> dict[str, Any]:
        def report(step: int, steps: int, preview: bytes | None) -> bool:
            try:
                answer = self.dispatcher.report.remote(job.name, job.epoch, step, steps, preview)
                return bool(answer.result(timeout_s=_REPORT_TIMEOUT_S))
            except (RayError, RayServeException, TimeoutError) as error:
                # A dispatcher that starts again is no fault of the job's; if another has taken over, the ledger's
                # fence refuses the result.
                _log.warning("step %d of %s could not be reported: %r", step, job.request.row_id, error)
                return True

        outcome = self.path.render(job, run, report)
        record = to_record(outcome)
        if record.get("code") == "out_of_memory":
            _free_memory()
        return {"outcome": record, "memory": _memory()}


def _free_memory() -> None:
    """Give back what the failed job left, so that the next one finds the memory that this one found."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory() -> dict[str, float]:
    """Return the peaks of this process's memory, in bytes."""
    import torch

    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    if torch.cuda.is_available():
        peaks["gpu"] = float(torch.cuda.max_memory_allocated())
    return peaks
