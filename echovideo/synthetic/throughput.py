"""Measures how fast people are drawn on a GPU: `python -m echovideo.synthetic.throughput`.

Writes results/throughput.json beside this file. Needs torch, numpy and nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from echovideo.results import Row, machine_name, reaches, write_results
from echovideo.synthetic import RESULTS
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import sample_conditions, scene_curves
from echovideo.synthetic.draw import SIDE, draw_tensors
from echovideo.synthetic.person import SPLITS, identity_parameters

FRAMES = 17
FLOOR = 20_000.0


def frames_per_second(work: Callable[[], object], frames: int, device: str, seconds: float) -> float:
    """Return how many frames a second `work`, which makes `frames` a call, makes over about `seconds`."""

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        work()
    finish()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        finish()
        calls += 1
    return calls * frames / (time.perf_counter() - start)


def measure(clips: int, device: str, *, compiled: bool, seconds: float) -> list[Row]:
    """Return the result rows for batches of `clips` clips of 17 frames of 96 x 96."""
    seeds = list(SPLITS["train"][:clips])
    conditions = sample_conditions(seeds)
    identity = identity_parameters(torch.tensor(seeds, device=device))
    scene = scene_curves(conditions, FRAMES).to(device)
    drawn = frames_per_second(
        lambda: draw_tensors(identity, scene, SIDE, SIDE, compiled=compiled), clips * FRAMES, device, seconds
    )

    def batch() -> None:
        fresh = sample_conditions(seeds)
        for condition in fresh:
            caption(condition, seed=condition.seed)
        people = identity_parameters(torch.tensor(seeds, device=device))
        draw_tensors(people, scene_curves(fresh, FRAMES).to(device), SIDE, SIDE, compiled=compiled)

    whole = frames_per_second(batch, clips * FRAMES, device, seconds)
    return [
        Row(name="drawing alone", metric="throughput", value=drawn, unit="frames/s"),
        Row(name="with people and captions", metric="throughput", value=whole, unit="frames/s", floor=FLOOR),
    ]


def main() -> None:
    """Measure, print and write; exit with 1 if the floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=64, help="clips in a batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    options = parser.parse_args()
    rows = measure(options.clips, options.device, compiled=not options.eager, seconds=options.seconds)
    write_results("throughput", rows, RESULTS, machine=machine_name(options.device), commit=options.commit)
    if not reaches(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
