"""Previews: small pictures from latents, which change nothing of the video they show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from echovideo.conditioning import Condition
from echovideo.engine import Engine, KeepGoing
from echovideo.preview import LatentPreview
from echovideo.request import RenderRequest
from echovideo.settings import EngineSettings


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.open(tiny_folder, EngineSettings())


def test_preview_of_known_latents_shows_the_middle_frame_in_its_colours() -> None:
    # Channel 0 is red, 1 green, 2 blue, and the constant does nothing.
    to_rgb = torch.zeros(17, 3)
    to_rgb[:3] = torch.eye(3)
    latents = torch.full((1, 3, 16, 6, 10), -1.0)
    latents[0, 1, 0, :, :5] = 1
    latents[0, 1, 2, :, 5:] = 1
    with Image.open(io.BytesIO(LatentPreview(to_rgb).jpeg(latents))) as image:
        assert image.size == (320, 192)
        pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[96, 20] - [255, 0, 0]).max() < 16
    assert np.abs(pixels[96, 300] - [0, 0, 255]).max() < 16


def test_preview_fit_of_a_vae_is_the_same_each_time(engine: Engine) -> None:
    first, second = LatentPreview.fit(engine.vae), LatentPreview.fit(engine.vae)
    assert first.to_rgb.shape == (17, 3)
    torch.testing.assert_close(first.to_rgb, second.to_rgb, atol=1e-4, rtol=0)
    assert first.to_rgb.abs().max() > 0.01


def test_render_with_previews_gives_the_bytes_of_one_without(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    condition = Condition(
        fused_2ND=torch.randn(2, 226, 128, generator=generator),
        face_mean_CHW=torch.randn(16, 6, 4, generator=generator),
        face_std_CHW=torch.ones(16, 6, 4),
    )
    request = RenderRequest(
        row_id="a", prompt="p", photo_uri="a.png", height=48, width=32, num_frames=9, num_inference_steps=3
    )
    drawn: list[bytes] = []
    draws: KeepGoing = lambda step, steps, draw: drawn.append(draw()) is None  # noqa: E731
    plain = engine.render(condition, request, 1, lambda step, steps, draw: True)
    watched = engine.render(condition, request, 1, draws)
    assert np.array_equal(plain.frames_FHWC, watched.frames_FHWC)
    assert len({*drawn}) == 3
