"""Many clips at once from the tiny model: the pipeline's sampling, in batches, for scoring."""

from __future__ import annotations

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor

from echovideo.conditioning import place_face_latents
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.request import GuidanceSchedule
from echovideo.sampler import guidance_scales
from echovideo.tiny.parts import scheduler
from echovideo.tiny.world import Encoders, Photos

_DECODED_AT_ONCE = 64


@torch.no_grad()
def generate(
    transformer: EchoVideoTransformer3DModel,
    encoders: Encoders,
    prompts: list[str],
    photos: Photos,
    *,
    generator: torch.Generator,
    steps: int = 25,
    guidance: float = 6.0,
    guidance_schedule: GuidanceSchedule = "published",
    face_latent: float = 1.0,
    identity: bool = True,
) -> Tensor:
    """Return a clip of each prompt and photo, uint8 (B, 17, 96, 96, 3) on the CPU.

    `face_latent` goes from sampling without the face's latents, 0, to the published sampling, 1; between them it
    mixes the two velocities. Without `identity` every photo's tokens and embedding are the null ones.
    """
    device, dtype = transformer.proj_out.weight.device, transformer.proj_out.weight.dtype
    null = encoders.null()
    count = len(prompts)
    text = encoders.text(encoders.tokens(prompts)).to(dtype)
    tokens, embedding = photos.tokens_BND.to(dtype), photos.embedding_BD.to(dtype)
    no_tokens = null.face_tokens_1ND.to(dtype).expand(count, -1, -1)
    no_embedding = torch.zeros_like(embedding)
    if not identity:
        tokens, embedding = no_tokens, no_embedding
    conditions = (
        transformer.fuse(null.text_1ND.to(dtype).expand(count, -1, -1), no_tokens, no_embedding),
        transformer.fuse(text, tokens, embedding),
    )

    latent_frames, side = 5, 12
    sampler: CogVideoXDPMScheduler = scheduler()
    sampler.set_timesteps(steps, device=device)
    timesteps = tuple(int(t) for t in sampler.timesteps)
    scales = guidance_scales(guidance_schedule, guidance, timesteps)
    rotary = rotary_tables(latent_frames, side // 2, side // 2, transformer.config.attention_head_dim, device)
    latents = torch.randn((count, latent_frames, 16, side, side), generator=generator, device=device)
    noise = torch.randn(photos.mean_BCHW.shape, generator=generator, device=device)
    sample = (photos.mean_BCHW.float() + photos.std_BCHW.float() * noise) * encoders.scaling_factor
    face = torch.cat([place_face_latents(one, latent_frames) for one in sample])
    shown = [(1 - face_latent, torch.zeros_like(face)), (face_latent, face)]
    shown = [(share, given) for share, given in shown if share]

    predicted = None
    for step, timestep in enumerate(timesteps):
        at = torch.full((count,), timestep, device=device)
        velocity = torch.zeros_like(latents)
        for share, given in shown:
            noisy = torch.cat([latents, given], dim=2).to(dtype)
            baseline, guided = (transformer.denoise(noisy, condition, at, rotary).float() for condition in conditions)
            velocity = velocity + share * (baseline + scales[step] * (guided - baseline))
        previous = timesteps[step - 1] if step else None
        latents, predicted = sampler.step(
            velocity, predicted, timestep, previous, latents, generator=generator, return_dict=False
        )
    return torch.cat([decoded(encoders, part) for part in latents.split(_DECODED_AT_ONCE)])


def decoded(encoders: Encoders, latents_BFCHW: Tensor) -> Tensor:
    """Return the clips of scaled latents (B, F, 16, h, w), uint8 (B, frames, 8 h, 8 w, 3) on the CPU."""
    latents = (latents_BFCHW / encoders.scaling_factor).transpose(1, 2).bfloat16()
    video = encoders.vae.decode(latents).sample.float()  # type: ignore[operator]
    pixels: Tensor = ((video.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 4, 1).cpu()
