"""Stages whose networks are stubs and whose ledger, files and actors are real, to see what faults do to a run.

A row's tags say what befalls it: `kill` names the stage that ends its own worker, `raise` the one that raises, `memory`
the one that runs out of it, `face` makes the frames show the photo's person, `step_s` says how long a step takes, and
a row whose `ends` is "never" takes its last step until it is stopped. Each render is noted in `renders.log` beside the
output root, each step in `steps.log`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import skimage.data
import torch

from echovideo.conditioning import Condition
from echovideo.engine import KeepGoing, Rendered
from echovideo.errors import RenderCancelledError
from echovideo.request import RenderRequest
from echovideo.training.adapters import AdapterSlot
from echovideo.video import poster_jpeg
from pipelines.config import RunConfig
from pipelines.ledger import Claim
from pipelines.run import drive
from pipelines.stages.render import RenderStage
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage

STEPS = 10
STEP_S = 0.03


def befall(row: Row, stage: str) -> None:
    """Do to this process what the row's tags say."""
    if row.request.tags.get("kill") == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    if row.request.tags.get("raise") == stage:
        raise ValueError(f"as the row {row.request.row_id} says")
    if row.request.tags.get("memory") == stage:
        raise MemoryError("as much as there is was not enough")


class StubIdentity(Stage):
    """Gives every row the identity that the model folder holds."""

    name = "identity"

    def work(self, row: Row, claim: Claim) -> Row:
        befall(row, self.name)
        identity = (Path(self.config.model) / "identity.safetensors").read_bytes()
        return replace(row, identity=identity)


class StubCondition(Stage):
    """Gives every row the condition that the model folder holds."""

    name = "condition"

    def work(self, row: Row, claim: Claim) -> Row:
        befall(row, self.name)
        return replace(row, condition=(Path(self.config.model) / "condition.safetensors").read_bytes())


class StubRenderer:
    """Takes ten short steps and draws noise, or the astronaut."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.adapter = AdapterSlot(torch.nn.Module())

    def render(self, condition: Condition, request: RenderRequest, seed: int, keep_going: KeepGoing) -> Rendered:
        befall(Row(request=request), "render")
        last = repeat(STEPS - 1) if request.tags.get("ends") == "never" else ()
        for step in chain(range(STEPS), last):
            if not keep_going(step, STEPS, _draw):
                raise RenderCancelledError("as asked")
            with self.log.with_name("steps.log").open("a") as log:
                log.write(f"{request.row_id} {step} {os.getpid()}\n")
            time.sleep(float(request.tags.get("step_s", STEP_S)))
        with self.log.open("a") as log:
            log.write(f"{request.row_id} {seed}\n")
        if request.tags.get("face"):
            photo = skimage.data.astronaut()[: request.height, 64 : 64 + request.width]
            frames = np.repeat(photo[None], request.num_frames, axis=0)
        else:
            shape = (request.num_frames, request.height, request.width, 3)
            frames = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
        return Rendered(frames_FHWC=frames, timings={"denoise": STEPS * STEP_S})


def _draw() -> bytes:
    return poster_jpeg(np.zeros((32, 32, 3), np.uint8))


class StubRender(RenderStage):
    """The real render stage around the stub renderer."""

    def open_renderer(self) -> StubRenderer:
        return StubRenderer(renders_log(self.config))


STUBS = (StubIdentity, StubCondition, StubRender)


def renders_log(config: RunConfig) -> Path:
    """Return the file in which each finished render is a line "row_id seed"."""
    return Path(config.output).parent / "renders.log"


if __name__ == "__main__":
    drive(RunConfig.from_record(json.loads(Path(sys.argv[1]).read_text())), STUBS)
