"""Trains the tiny model's transformer on the drawn world: base, stage 1, stage 2."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.synthetic.person import SPLITS
from echovideo.tiny.parts import scheduler, tiny_config
from echovideo.tiny.world import Encoders, Whitening, World, WorldSource, encode_world
from echovideo.training.batch import NullCondition
from echovideo.training.initialise import start_as_base
from echovideo.training.loop import Trainer, train
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import GROUPS, AverageSettings, StageSettings, base, stage_one, stage_two

_FACE_MASK_WEIGHT = 4.0
"""A clip's face fills 18 % of its latent cells; with this weight it has half of the loss."""
_PACE_STEPS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """How the transformer is trained: `people` clips are drawn, and `seconds` are for that and for all training.

    The base gets `base_share` of the steps that fit, stage 1 `stage_one_share` of those that the base leaves.
    """

    seconds: float
    seed: int = 3
    people: int = 98_304
    batch_size: int = 256
    base_share: float = 0.15
    stage_one_share: float = 0.45
    learning_rate: float = 8e-4


class Course:
    """The drawn world with all that training a transformer on it needs but the stages."""

    def __init__(self, world: World, null: NullCondition, scaling_factor: float) -> None:
        self.whitening = Whitening.of(world.embedding_NPD)
        self._world, self._null = world, null
        self._device = world.latents_NFCHW.device
        self._schedule = NoiseSchedule.of(scheduler(), scaling_factor, self._device)

    def fresh(self, seed: int) -> EchoVideoTransformer3DModel:
        """Return a transformer, bfloat16, for mapped embeddings, in which identity does nothing yet."""
        torch.manual_seed(seed)
        model = EchoVideoTransformer3DModel(tiny_config()).to(self._device)
        start_as_base(model)
        self.whitening.begin(model.face_prj_wofc.proj_in)
        return model.to(torch.bfloat16)

    def take(self, model: EchoVideoTransformer3DModel, settings: StageSettings) -> None:
        """Train the transformer, which takes mapped embeddings, in place by one stage."""
        source = WorldSource(self._world, self.whitening, settings)
        graphed = self._device.type == "cuda"
        progress = train(model, self._schedule, source, self._null, settings, graphed=graphed)
        print(f"{settings.name}: {progress}", flush=True)

    def seconds_a_step(self, model: EchoVideoTransformer3DModel, settings: StageSettings) -> float:
        """Return how long a step takes, by training a copy of the transformer for some."""
        source = WorldSource(self._world, self.whitening, settings)
        graphed = self._device.type == "cuda"
        trainer = Trainer(copy.deepcopy(model), self._schedule, self._null, settings, graphed=graphed)
        # The first steps choose and build kernels.
        for part in ("warm-up", "pace"):
            began = time.monotonic()
            for _ in range(_PACE_STEPS):
                trainer.take(source.batch(trainer.steps, 0, 1))
            # Reading a number waits for the device.
            taken = float(trainer.optimizer.updates)
            seconds = time.monotonic() - began
            print(f"{part}: {taken:.0f} steps, {seconds:.1f} s", flush=True)
        return seconds / _PACE_STEPS


def draw_world(people: int, seed: int, encoders: Encoders, device: torch.device) -> World:
    """Return the encoded world of the first training people."""
    generator = torch.Generator(device).manual_seed(seed)
    return encode_world(encoders, SPLITS["train"][:people], 0, generator, compiled=device.type == "cuda")


def base_stage(settings: ModelSettings, steps: int) -> StageSettings:
    """Return the settings of the text-to-video base."""
    return base(steps=steps, learning_rate=settings.learning_rate, **_common(settings))


def identity_stages(settings: ModelSettings, steps: int) -> tuple[StageSettings, StageSettings]:
    """Return the settings of stages 1 and 2, which share `steps`."""
    first = round(steps * settings.stage_one_share)
    # The paper's base knows faces before it learns identities; this small one learns both in stage 1.
    one = stage_one(
        steps=first,
        groups=GROUPS,
        references="cross_clip",
        learning_rate=settings.learning_rate,
        **_common(settings),
    )
    return one, stage_two(steps=steps - first, learning_rate=settings.learning_rate / 2, **_common(settings))


def train_model(
    settings: ModelSettings,
    encoders: Encoders,
    device: torch.device,
    start: EchoVideoTransformer3DModel | None = None,
) -> EchoVideoTransformer3DModel:
    """Return the transformer with averaged weights, bfloat16 on `device`, for raw embeddings.

    `start` goes on from another one for raw embeddings, and leaves out the base.
    """
    began = time.monotonic()
    world = draw_world(settings.people, settings.seed, encoders, device)
    course = Course(world, encoders.null(), encoders.scaling_factor)
    if start is None:
        model = course.fresh(settings.seed)
    else:
        course.whitening.unfold(start.face_prj_wofc.proj_in)
        model = start.to(device, torch.bfloat16)
    pace = course.seconds_a_step(model, identity_stages(settings, 2)[1])
    steps = max(4, int((settings.seconds - (time.monotonic() - began)) / pace))
    if start is None:
        text = base_stage(settings, max(1, round(steps * settings.base_share)))
        course.take(model, text)
        steps -= text.steps
    for stage in identity_stages(settings, steps):
        course.take(model, stage)
    course.whitening.fold(model.face_prj_wofc.proj_in)
    return model.eval().requires_grad_(False)


def _common(settings: ModelSettings) -> dict[str, Any]:
    return {
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "average": AverageSettings(decay=0.999),
        "face_mask_weight": _FACE_MASK_WEIGHT,
        # Reading the loss waits for the device.
        "record_every": 50,
    }
