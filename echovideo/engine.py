"""The engine: a loaded DiT and VAE decoder that turn conditions into frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch

from echovideo.conditioning import Condition
from echovideo.errors import RenderCancelledError, RunError
from echovideo.model.folder import load_scheduler, load_transformer, load_vae, vae_dtype
from echovideo.preview import LatentPreview
from echovideo.request import RenderRequest
from echovideo.sampler import Scheduler, advance, decode, denoise_step, prepare
from echovideo.settings import EngineSettings, check_tier
from echovideo.training.adapters import AdapterSlot

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

    from echovideo.model.transformer import EchoVideoTransformer3DModel

KeepGoing: TypeAlias = Callable[[int, int, Callable[[], bytes]], bool]
"""Asked before each step with the steps done, the steps in all, and what draws a small JPEG of the video so far."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rendered:
    """Frames uint8 RGB (F, H, W, 3), and seconds spent by part of the work."""

    frames_FHWC: np.ndarray[Any, Any]  # noqa: N815
    timings: Mapping[str, float] = field(default_factory=dict)


def model_dtype(settings: EngineSettings) -> torch.dtype:
    """Return the floating point type of weights and latents on the settings' device."""
    return torch.bfloat16 if settings.device == "cuda" else torch.float32


def check_device(settings: EngineSettings) -> None:
    """Raise RunError `no_gpu` unless the settings' device is there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RunError("a CUDA GPU was asked for, and torch finds none here", code="no_gpu")


class Engine:
    """The DiT, the VAE decoder and the scheduler of one model, loaded once a process."""

    def __init__(
        self,
        transformer: EchoVideoTransformer3DModel,
        vae: AutoencoderKLCogVideoX,
        scheduler: Scheduler,
        settings: EngineSettings,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.settings = settings
        self.adapter = AdapterSlot(transformer)

    @classmethod
    def open(cls, folder: Path, settings: EngineSettings) -> Self:
        """Load what rendering needs from a model folder; raises WeightsError, or RunError without the device."""
        check_device(settings)
        dtype = model_dtype(settings)
        return cls(
            transformer=load_transformer(folder, dtype=dtype).to(settings.device),
            vae=load_vae(folder, dtype=vae_dtype(dtype)).to(settings.device),
            scheduler=load_scheduler(folder),
            settings=settings,
        )

    @cached_property
    def preview(self) -> LatentPreview:
        """What draws pictures of latents; fitted when the first one is asked for."""
        return LatentPreview.fit(self.vae)

    def render(self, condition: Condition, request: RenderRequest, seed: int, keep_going: KeepGoing) -> Rendered:
        """Return the request's frames for `seed`.

        `keep_going` is asked before each step; when it says no, RenderCancelledError is raised. Raises RequestError
        for a tier this engine does not give.
        """
        check_tier(request.tier)
        torch.set_num_threads(self.settings.num_threads)
        started = time.perf_counter()
        state = prepare(
            self.transformer,
            self.vae,
            self.scheduler,
            condition,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_schedule=request.guidance_schedule,
            generator=torch.Generator().manual_seed(seed),
        )
        while not state.done:
            # What the model takes for the finished video shows more than latents that are still half noise.
            seen = state.latents_BFCHW if state.predicted_original is None else state.predicted_original
            if not keep_going(state.step, len(state.timesteps), partial(self._draw, seen)):
                raise RenderCancelledError(f"stopped after {state.step} of {len(state.timesteps)} steps")
            state = advance(state, denoise_step(self.transformer, state))
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        denoised = time.perf_counter()
        frames = to_uint8(decode(self.vae, state.latents_BFCHW))
        return Rendered(
            frames_FHWC=frames,
            timings={"denoise": denoised - started, "decode": time.perf_counter() - denoised},
        )

    def _draw(self, latents_BFCHW: torch.Tensor) -> bytes:
        return self.preview.jpeg(latents_BFCHW)


def to_uint8(video_BFCHW: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return one decoded video (1, F, 3, H, W) in [0, 1] as uint8 (F, H, W, 3) frames."""
    # Laid out for the encoder on the device, where that costs nothing.
    frames_FHWC = (video_BFCHW[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return frames_FHWC.cpu().numpy()
