"""Resources: refuse a run that could never start, before it waits for ever without a word."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echovideo.errors import RunError

SPARE_CPUS = 1.0
"""CPUs left over for reading and repartitioning; Ray runs these as tasks of one CPU beside the stages' actors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResources:
    """What one stage reserves: `actors` workers, each with so many CPUs and GPUs."""

    name: str
    actors: int
    num_cpus: float
    num_gpus: float = 0.0


def check_resources(stages: Sequence[StageResources], available: Mapping[str, float]) -> None:
    """Raise RunError `too_few_resources` unless all stages' actors fit at once, with SPARE_CPUS left over.

    `available` is the cluster's total as Ray names it: "CPU", "GPU". Every stage keeps its actors
    for the whole run, so what does not fit together never starts. Placement on single nodes is not checked.
    """
    needs = {
        "CPU": sum(stage.actors * stage.num_cpus for stage in stages) + SPARE_CPUS,
        "GPU": sum(stage.actors * stage.num_gpus for stage in stages),
    }
    problems = []
    numbers = {}
    for resource, need in needs.items():
        there = available.get(resource, 0.0)
        (numbers[f"{resource.lower()}_needed"], numbers[f"{resource.lower()}_available"]) = need, there
        # Sums of fractional CPUs carry rounding; Ray itself counts in 1/10000.
        if need > there + 1e-4:
            problems.append(f"needs {need:g} {resource}s, the cluster has {there:g}")
    if problems:
        shares = "; ".join(
            f"{stage.name} {stage.actors} x ({stage.num_cpus:g} CPUs, {stage.num_gpus:g} GPUs)" for stage in stages
        )
        raise RunError(
            f"the run {', and '.join(problems)}: {shares}; {SPARE_CPUS:g} CPU is kept spare. "
            "Use fewer actors or a smaller share for each, or a larger cluster.",
            code="too_few_resources",
            numbers=numbers,
        )


def check_disk(path: Path, need_bytes: int) -> None:
    """Raise RunError `too_little_disk` unless the disk that holds (or will hold) `path` has `need_bytes` free."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise RunError(
            f"{path} needs {need_bytes / 2**30:.2f} GiB of disk and {free / 2**30:.2f} GiB is free; "
            "free some space or choose another folder",
            code="too_little_disk",
            numbers={"bytes_needed": need_bytes, "bytes_free": free},
        )
