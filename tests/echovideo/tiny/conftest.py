"""Drawings and a world of a few people, small enough for a CPU."""

from __future__ import annotations

import pytest
import torch

from echovideo.synthetic.clip import sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing, draw_tensors
from echovideo.synthetic.person import SPLITS, identity_parameters
from echovideo.tiny.parts import TEXT_TOKENS
from echovideo.tiny.world import CAPTIONS, PHOTOS, World

PEOPLE = 4


@pytest.fixture(scope="session")
def photos() -> Drawing:
    """One picture of each of four test people, 128 pixels high."""
    identity = identity_parameters(torch.tensor(SPLITS["test"][:PEOPLE]))
    return draw_tensors(identity, scene_curves(sample_conditions(range(PEOPLE)), 3)[:, 1:2], 128, 128)


@pytest.fixture(scope="session")
def world() -> World:
    """A world of eight people made of noise, in the tiny model's shapes, each photo's tensors other than the next's."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(8, *shape, generator=generator)

    return World(
        latents_NFCHW=noise(5, 16, 12, 12).bfloat16(),
        text_NCTD=noise(CAPTIONS, TEXT_TOKENS, 128).bfloat16(),
        share_NFHW=(noise(5, 12, 12).sigmoid() * 255).byte(),
        tokens_NPTD=noise(PHOTOS, 196, 128).bfloat16(),
        embedding_NPD=noise(1, 128) + 0.2 * noise(PHOTOS, 128) + 3,
        mean_NPCHW=noise(PHOTOS, 16, 12, 12).bfloat16(),
        std_NPCHW=noise(PHOTOS, 16, 12, 12).abs().bfloat16(),
    )
