"""A very small model, examples for it, and the numbers of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch

from echovideo.hashing import normal, uniform
from echovideo.model.config import TransformerConfig
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.batch import NullCondition, TrainingBatch, example_seeds
from echovideo.training.initialise import start_as_base
from echovideo.training.loop import ScoreRecord, StepRecord
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import StageSettings, stage_two

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    time_embed_dim=16,
    text_embed_dim=24,
    face_embed_dim=16,
    face_features_embed_dim=12,
    max_text_seq_length=6,
    face_seq_length=5,
    face_features_seq_length=4,
    resampler_dim=16,
    resampler_depth=1,
    resampler_num_heads=2,
    resampler_head_dim=8,
    resampler_num_queries=3,
)


def small_model(seed: int = 0) -> EchoVideoTransformer3DModel:
    """Return the model with random weights, started as its base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EchoVideoTransformer3DModel(CONFIG)
    start_as_base(model)
    return model


def schedule() -> NoiseSchedule:
    """Return its noise schedule, with the published VAE's scaling factor."""
    # Imported here because it takes seconds to load, and most processes that train are given the schedule.
    from echovideo.tiny.parts import scheduler

    return NoiseSchedule.of(scheduler(), 0.7)


def null_condition() -> NullCondition:
    """Return a null condition that no example has."""
    seeds = torch.tensor([77])
    return NullCondition(
        text_1ND=normal(seeds, 6 * 24, 0).view(1, 6, 24), face_tokens_1ND=normal(seeds, 5 * 16, 1).view(1, 5, 16)
    )


def make_batch(seeds: torch.Tensor, frames: int = 2, height: int = 4, width: int = 6) -> TrainingBatch:
    """Return the examples of these seeds, each a function of its own."""
    count = len(seeds)

    def states(stream: int, *shape: int) -> torch.Tensor:
        return normal(seeds, torch.Size(shape).numel(), stream).view(count, *shape)

    return TrainingBatch(
        latents_BFCHW=states(100, frames, 16, height, width),
        text_BND=states(200, 6, 24),
        face_tokens_BND=states(300, 5, 16),
        embedding_BD=states(400, 12),
        face_mean_BCHW=states(500, 16, height, width),
        face_std_BCHW=states(600, 16, height, width).abs(),
        face_share_BFHW=uniform(seeds, frames * height * width, 700).view(count, frames, height, width),
        seed_B=seeds,
    )


def slice_of(batch: TrainingBatch, places: slice) -> TrainingBatch:
    """Return some of a batch's examples."""
    return replace(batch, **{name.name: getattr(batch, name.name)[places] for name in fields(batch)})


@dataclass(frozen=True)
class SmallSource:
    """Examples by hashing; those of the steps in `broken` are not numbers."""

    batch_size: int = 4
    seed: int = 5
    broken: tuple[int, ...] = ()

    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        share = self.batch_size // world_size
        batch = make_batch(example_seeds(self.seed, step, rank * share + torch.arange(share)))
        return replace(batch, latents_BFCHW=batch.latents_BFCHW * torch.nan) if step in self.broken else batch


@dataclass
class Kept:
    """Keeps what a run records."""

    steps: list[StepRecord] = field(default_factory=list)
    scores: list[ScoreRecord] = field(default_factory=list)

    def __call__(self, found: StepRecord | ScoreRecord) -> None:
        (self.steps if isinstance(found, StepRecord) else self.scores).append(found)  # type: ignore[arg-type]

    @property
    def losses(self) -> list[float]:
        return [found.loss for found in self.steps]


def settings(**changes: object) -> StageSettings:
    """Return stage 2 at the size of a test."""
    values: dict[str, object] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2}
    return stage_two(**values | {"record_every": 2} | changes)
