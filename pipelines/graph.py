"""The Ray Data graph: rows in, outcomes out, each stage a pool of actors and each row a block of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from echovideo.errors import RunError
from echovideo.request import RenderRequest
from pipelines.config import RunConfig
from pipelines.outcome import RowOutcome
from pipelines.resources import StageResources
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
    reserved = config.stages()
    pools = [
        Pool(
            actor=stage,
            arguments=(config, epoch),
            resources=reserved[stage.name],
            calls_at_once=stage.calls_at_once,
        )
        for stage in stages
    ]
    for columns in stream([Row(request=request).to_columns() for request in rows], pools):
        outcome = Row.from_columns(columns).outcome
        assert outcome is not None, "a row left the last stage without an outcome"
        yield outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """A stage of a graph: a class whose instances take and return one row's columns, and what each instance needs."""

    actor: type
    arguments: tuple[Any, ...]
    resources: StageResources
    calls_at_once: int = 1


def stream(rows: Sequence[dict[str, Any]], pools: Sequence[Pool]) -> Iterator[dict[str, Any]]:
    """Run rows of columns through pools of actors and yield each as it leaves the last, in any order.

    The actors turn a row's errors into outcomes. Raises RunError `stage_failed` when one cannot work at all.
    """
    for start in range(0, len(rows), WINDOW_ROWS):
        yield from _window(rows[start : start + WINDOW_ROWS], pools)


def _window(rows: Sequence[dict[str, Any]], pools: Sequence[Pool]) -> Iterator[dict[str, Any]]:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context):
        dataset: ray.data.Dataset = ray.data.from_items(
            list(rows),
            # One row is one block: what a crash loses or repeats is then one row.
            override_num_blocks=len(rows),
        )
        for pool in pools:
            dataset = dataset.map(
                # Ray's types know no classes whose instances are called; it makes one in each actor.
                cast(Any, pool.actor),
                fn_constructor_args=pool.arguments,
                compute=ActorPoolStrategy(
                    size=pool.resources.actors,
                    max_concurrent_calls_per_actor=pool.calls_at_once,
                    enable_true_multi_threading=pool.calls_at_once > 1,
                ),
                num_cpus=pool.resources.num_cpus,
                num_gpus=pool.resources.num_gpus,
            )
        try:
            yield from dataset.iter_rows()
        except RayError as error:
            # Rows end with outcomes, so this is a stage that cannot work at all: a damaged model, a store out of reach.
            reason = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()[-1]
            raise RunError(f"a stage could not go on: {reason}", code="stage_failed") from error
