"""The sampler's four atoms: prepare, denoise_step, advance, decode; every caller drives these and nothing else.

Between two atoms a caller may report progress, look at the latents, or stop.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from echovideo.conditioning import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, Condition, place_face_latents
from echovideo.model.rotary import rotary_tables
from echovideo.request import GuidanceSchedule, check_num_frames, check_size

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    from echovideo.model.transformer import EchoVideoTransformer3DModel

Scheduler: TypeAlias = "CogVideoXDPMScheduler | CogVideoXDDIMScheduler"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplerState:
    """A video between two steps. Latents are (1, F, 16, h, w); `step` counts from 0, `timesteps` fall to noise-free.

    `scheduler` and `generator` belong to this video alone; the generator's stream moves as steps are taken.
    """

    latents_BFCHW: torch.Tensor  # noqa: N815
    face_latents_BFCHW: torch.Tensor  # noqa: N815
    condition_2ND: torch.Tensor  # noqa: N815
    rotary: tuple[torch.Tensor, torch.Tensor]
    timesteps: tuple[int, ...]
    guidance: tuple[float, ...]
    scheduler: Scheduler
    generator: torch.Generator
    step: int = 0
    predicted_original: torch.Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.step == len(self.timesteps)


def guidance_scales(schedule: GuidanceSchedule, scale: float, timesteps: tuple[int, ...]) -> tuple[float, ...]:
    """Return the guidance scale of each step; a `scale` of 1 turns guidance off, whatever the schedule.

    "constant" is `scale`. The others follow 1 + scale (1 - cos(pi ((N - x) / N)^5)) / 2 for N steps: "cosine" with the
    step index as x, so that guidance falls from 1 + scale to 1; "published" with the timestep itself, which makes
    a wave between 1 and 1 + scale and is what the published results used.
    """
    if schedule == "constant" or scale == 1:
        return (scale,) * len(timesteps)
    num_steps = len(timesteps)
    places = timesteps if schedule == "published" else range(num_steps)
    return tuple(1 + scale * (1 - math.cos(math.pi * ((num_steps - x) / num_steps) ** 5.0)) / 2 for x in places)


@torch.inference_mode()
def prepare(
    transformer: EchoVideoTransformer3DModel,
    vae: AutoencoderKLCogVideoX,
    scheduler: Scheduler,
    condition: Condition,
    *,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_schedule: GuidanceSchedule,
    generator: torch.Generator,
) -> SamplerState:
    """Draw the noise and the face's latents, in the published order, and lay out the schedule.

    Sizes in pixels. Raises RequestError for a size or frame count that cannot be rendered.
    """
    from diffusers.utils.torch_utils import randn_tensor

    check_size(height, width)
    check_num_frames(num_frames)
    like = transformer.patch_embed.proj.weight
    latent_frames = (num_frames - 1) // TEMPORAL_COMPRESSION + 1
    latent_height, latent_width = height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION
    config = transformer.config

    own_scheduler = copy.deepcopy(scheduler)
    own_scheduler.set_timesteps(num_inference_steps)
    shape = (1, latent_frames, config.out_channels, latent_height, latent_width)
    latents = randn_tensor(shape, generator=generator, device=like.device, dtype=like.dtype)
    latents = latents * own_scheduler.init_noise_sigma

    mean, std = condition.face_mean_CHW.to(like.device), condition.face_std_CHW.to(like.device)
    noise = randn_tensor((1, *mean[:, None].shape), generator=generator, device=like.device, dtype=mean.dtype)
    face = (mean + std * noise[0, :, 0]) * vae.config.scaling_factor

    timesteps = tuple(int(t) for t in own_scheduler.timesteps)
    return SamplerState(
        latents_BFCHW=latents,
        face_latents_BFCHW=place_face_latents(face.to(like.dtype), latent_frames),
        condition_2ND=condition.fused_2ND.to(like),
        rotary=rotary_tables(
            latent_frames,
            latent_height // config.patch_size,
            latent_width // config.patch_size,
            config.attention_head_dim,
            like.device,
        ),
        timesteps=timesteps,
        guidance=guidance_scales(guidance_schedule, guidance_scale, timesteps),
        scheduler=own_scheduler,
        generator=generator,
    )


@torch.inference_mode()
def denoise_step(transformer: EchoVideoTransformer3DModel, state: SamplerState) -> torch.Tensor:
    """Return the guided velocity u + s (c - u) of the current step, (1, F, 16, h, w) float32.

    Where the scale s is 1 that is c, and the unconditional pass is left out.
    """
    model_input = torch.cat([state.latents_BFCHW, state.face_latents_BFCHW], dim=2)
    timestep = torch.full((1,), state.timesteps[state.step], device=model_input.device)

    def velocity(half: torch.Tensor) -> torch.Tensor:
        return transformer.denoise(model_input, half, timestep, state.rotary).float()

    # Two passes of batch 1 cost what one of batch 2 does at this token count, in half the memory.
    unconditional, conditional = state.condition_2ND.split(1)
    scale = state.guidance[state.step]
    if scale == 1:
        return velocity(conditional)
    baseline = velocity(unconditional)
    return baseline + scale * (velocity(conditional) - baseline)


@torch.inference_mode()
def advance(state: SamplerState, velocity_BFCHW: torch.Tensor) -> SamplerState:
    """Return the state one scheduler step further; the previous state must not be used again (shared generator)."""
    from diffusers import CogVideoXDPMScheduler

    timestep, latents = state.timesteps[state.step], state.latents_BFCHW
    options: dict[str, Any] = {"generator": state.generator, "return_dict": False}
    if isinstance(state.scheduler, CogVideoXDPMScheduler):
        previous = state.timesteps[state.step - 1] if state.step else None
        latents, predicted = state.scheduler.step(
            velocity_BFCHW, state.predicted_original, timestep, previous, latents, **options
        )
    else:
        latents, predicted = state.scheduler.step(velocity_BFCHW, timestep, latents, eta=0.0, **options)
    return replace(
        state, latents_BFCHW=latents.to(state.latents_BFCHW.dtype), predicted_original=predicted, step=state.step + 1
    )


@torch.inference_mode()
def decode(vae: AutoencoderKLCogVideoX, latents_BFCHW: torch.Tensor) -> torch.Tensor:
    """Return the video (B, frames, 3, height, width) float32 in [0, 1] of final latents."""
    latents = latents_BFCHW.to(vae.device, vae.dtype).transpose(1, 2) / vae.config.scaling_factor
    video: torch.Tensor = vae.decode(latents).sample.float()
    return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)
