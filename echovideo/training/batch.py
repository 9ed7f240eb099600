"""What a training step sees: examples as tensors, the null condition, and where examples come from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Protocol

import torch

from echovideo.errors import DatasetError
from echovideo.hashing import hashed

_STRIDE = 0x9E3779B1


class Stream(IntEnum):
    """The streams of an example's seed; the last three are long draws, which take up the streams that follow theirs."""

    TIMESTEP = 0
    TEXT_DROPOUT = 1
    IDENTITY_DROPOUT = 2
    CONDITION_DROPOUT = 3
    FACE_LATENT_DROPOUT = 4
    REFERENCE = 5
    FACE_NOISE = 1 << 4
    NOISE = 1 << 10
    LATENTS = 1 << 11


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingBatch:
    """B examples of one size, on the device that trains; h and w are the latents' height and width.

    Each example is the latents of a clip, its caption, and one reference face of the person, from the same clip or
    from another one. Raises DatasetError for shapes that do not belong together.
    """

    latents_BFCHW: torch.Tensor  # noqa: N815
    """(B, F, 16, h, w): the VAE's latents, times its scaling factor."""
    text_BND: torch.Tensor  # noqa: N815
    """(B, 226, text_dim): T5 states of the caption."""
    face_tokens_BND: torch.Tensor  # noqa: N815
    """(B, 196, face_embed_dim): SigLIP states of the reference face."""
    embedding_BD: torch.Tensor  # noqa: N815
    """(B, face_features_embed_dim): the recogniser's raw embedding of the reference face."""
    face_mean_BCHW: torch.Tensor  # noqa: N815
    """(B, 16, h, w): mean of the VAE's posterior of the padded reference face, unscaled."""
    face_std_BCHW: torch.Tensor  # noqa: N815
    """(B, 16, h, w): its standard deviation."""
    face_share_BFHW: torch.Tensor  # noqa: N815
    """(B, F, h, w): the share of each latent cell that shows the face, 0 to 1."""
    seed_B: torch.Tensor  # noqa: N815
    """(B,) int64: decides every random number of the example in this step."""

    def __post_init__(self) -> None:
        batch, num_frames, channels, height, width = self.latents_BFCHW.shape
        expected = {
            "face_mean_BCHW": (batch, channels, height, width),
            "face_std_BCHW": (batch, channels, height, width),
            "face_share_BFHW": (batch, num_frames, height, width),
            "seed_B": (batch,),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise DatasetError(f"{name} is {tuple(getattr(self, name).shape)}, expected {shape}")
        for name in ("text_BND", "face_tokens_BND", "embedding_BD"):
            if len(getattr(self, name)) != batch:
                raise DatasetError(f"{name} holds {len(getattr(self, name))} examples, the latents {batch}")

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the batch on a device; from pinned memory the copy does not hold up the caller."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainingBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NullCondition:
    """What a dropped condition is replaced with, as in guidance's unconditional half; the null embedding is zeros.

    `text_1ND` (1, 226, text_dim) is T5's states of "", `face_tokens_1ND` (1, 196, face_embed_dim) SigLIP's states of
    an all-black image.
    """

    text_1ND: torch.Tensor  # noqa: N815
    face_tokens_1ND: torch.Tensor  # noqa: N815

    def to(self, device: torch.device | str) -> NullCondition:
        """Return the null condition on a device."""
        return NullCondition(text_1ND=self.text_1ND.to(device), face_tokens_1ND=self.face_tokens_1ND.to(device))


class ExampleSource(Protocol):
    """Where examples come from."""

    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        """Return the slice of one process of the examples of global step `step`, which counts from 0.

        Pure in its arguments. Slices are of one size, and together they are the same examples, with the same seeds,
        for every world size.
        """
        ...


def example_seeds(seed: int, step: int, places: torch.Tensor) -> torch.Tensor:
    """Return the seeds (B,) int64 of the examples at int64 `places` (B,) of the global batch of a step."""
    # Filled on the device: a number that is copied there waits for all that the device has been given.
    start = hashed(hashed(torch.full((), seed, device=places.device, dtype=torch.int64)) + step * _STRIDE)
    return hashed(start + hashed(places))
