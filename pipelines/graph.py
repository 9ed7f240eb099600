"""The Ray Data graph: rows in, outcomes out, each stage a pool of actors and each row a block of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from echovideo.errors import RunError
from echovideo.request import RenderRequest
from pipelines.config import RunConfig
from pipelines.outcome import RowOutcome
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage

WINDOW_ROWS = 1000
"""Rows in one execution: Ray's driver spends about 80 ms on each block, so a larger graph would start late."""


def outcomes(
    requests: Sequence[RenderRequest], config: RunConfig, epoch: int, stages: Sequence[type[Stage]]
) -> Iterator[RowOutcome]:
    """Run the requests through the stages and yield each row's committed outcome as it ends, in any order.

    Rows are taken by bucket, so that a renderer keeps one shape, and then by photo, so that caches hit. Raises RunError
    `stage_failed` when a stage cannot work at all, with its reason.
    """
    rows = sorted(requests, key=lambda request: (request.bucket, request.photo_uri or "", request.row_id))
    for start in range(0, len(rows), WINDOW_ROWS):
        yield from _window(rows[start : start + WINDOW_ROWS], config, epoch, stages)


def _window(
    requests: Sequence[RenderRequest], config: RunConfig, epoch: int, stages: Sequence[type[Stage]]
) -> Iterator[RowOutcome]:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    reserved = config.stages()
    with DataContext.current(context):
        dataset: ray.data.Dataset = ray.data.from_items(
            [Row(request=request).to_columns() for request in requests],
            # One row is one block: what a crash loses or repeats is then one row.
            override_num_blocks=len(requests),
        )
        for stage in stages:
            resources = reserved[stage.name]
            dataset = dataset.map(
                # Ray's types know no classes whose instances are called; it makes one in each actor.
                cast(Any, stage),
                fn_constructor_args=(config, epoch),
                compute=ActorPoolStrategy(
                    size=resources.actors,
                    max_concurrent_calls_per_actor=stage.calls_at_once,
                    enable_true_multi_threading=stage.calls_at_once > 1,
                ),
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
            )
        try:
            for columns in dataset.iter_rows():
                outcome = Row.from_columns(columns).outcome
                assert outcome is not None, "a row left the last stage without an outcome"
                yield outcome
        except RayError as error:
            # Rows end with outcomes, so this is a stage that cannot work at all: a damaged model, a store out of reach.
            reason = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()[-1]
            raise RunError(f"a stage could not go on: {reason}", code="stage_failed") from error
