"""Trains the tiny model's video autoencoder on drawn clips and faces, and measures it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from echovideo.synthetic.clip import ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing
from echovideo.synthetic.person import PARAMETERS, SPLITS, identity_parameters
from echovideo.tiny.drawing import TEST_CLIPS, draw_clips, draw_people, draw_photos, noisy_points
from echovideo.tiny.faces import face_image
from echovideo.tiny.optimise import Optimised, Progress
from echovideo.tiny.parts import SIDE, fresh_vae

_ROUGHNESS = 0.01
_EDGE_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderSettings:
    """How the autoencoder is trained: `steps` of `clips` clips and as many faces, on each of the devices.

    `kl_weight` multiplies the mean divergence of a latent number from the normal distribution.
    """

    seed: int = 1
    steps: int = 3000
    clips: int = 32
    learning_rate: float = 1e-3
    warmup: int = 150
    kl_weight: float = 1e-4


def train_autoencoder(
    settings: AutoencoderSettings, device: torch.device, progress: Progress
) -> AutoencoderKLCogVideoX:
    """Return the autoencoder with averaged weights, float32 on `device`."""
    torch.manual_seed(settings.seed)
    vae = fresh_vae().to(device).train()
    optimised = Optimised(
        vae,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        steps=settings.steps,
        channels_last=True,
    )
    generator = torch.Generator(device).manual_seed(settings.seed * 1000 + progress.rank)
    for step in range(settings.steps):
        loss, error = torch.zeros((), device=device), torch.zeros((), device=device)
        for video_BCFHW, weight_BFHW in _batches(settings, step, generator, progress, device):
            posterior = optimised.model.encode(video_BCFHW.bfloat16()).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device=device, dtype=torch.bfloat16)
            decoded = optimised.model.decode(posterior.mean + posterior.std * noise).sample.float()
            part = reconstruction_loss(decoded, video_BCFHW, weight_BFHW)
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            (part + settings.kl_weight * divergence).backward()
            loss = loss + part.detach()
            error = torch.maximum(error, F.mse_loss(decoded.detach(), video_BCFHW))
        optimised.step()
        # From -1 to 1 the range is 2.
        progress(step, loss=loss, psnr=10 * torch.log10(4 / error))
    return optimised.averaged()


def reconstruction_loss(decoded_BCFHW: Tensor, video_BCFHW: Tensor, weight_BFHW: Tensor) -> Tensor:
    """Return the weighted mean of a smooth absolute error (Charbonnier) of pixels and of their differences."""
    difference = (decoded_BCFHW - video_BCFHW) * 1.0
    weight = weight_BFHW[:, None]
    pixels = (torch.sqrt(difference.square() + _ROUGHNESS**2) * weight).mean()
    across = torch.sqrt(difference.diff(dim=-1).square() + _ROUGHNESS**2).mean()
    down = torch.sqrt(difference.diff(dim=-2).square() + _ROUGHNESS**2).mean()
    return pixels + _EDGE_WEIGHT * (across + down)


def _batches(
    settings: AutoencoderSettings, step: int, generator: torch.Generator, progress: Progress, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the step's clips, then its faces as clips of one frame: video (B, 3, F, 96, 96), -1 to 1, and weights."""
    first = (step * progress.world_size + progress.rank) * settings.clips
    seeds = range(first, first + settings.clips)
    people = [seed % len(SPLITS["train"]) for seed in seeds]
    drawing, conditions = draw_clips(people, seeds, device)
    yield _video(drawing), 0.75 + 0.75 * drawing.face_BFHW
    photos = draw_photos(people, conditions, device)
    faces = face_image(photos, noisy_points(photos, generator), SIDE)
    yield faces[:, :, None] * 2 - 1, torch.full((len(faces), 1, SIDE, SIDE), 0.25, device=device)


def _video(drawing: Drawing) -> Tensor:
    return drawing.frames_BFCHW.transpose(1, 2) * 2 - 1


@torch.inference_mode()
def reconstruct(vae: AutoencoderKLCogVideoX, video_BCFHW: Tensor) -> Tensor:
    """Return what the autoencoder makes of a video from its posterior's mean, -1 to 1."""
    like = next(vae.parameters())
    mean = vae.encode(video_BCFHW.to(like)).latent_dist.mean
    decoded: Tensor = vae.decode(mean).sample.float().clamp(-1, 1)
    return decoded


@torch.inference_mode()
def measure_autoencoder(vae: AutoencoderKLCogVideoX, device: torch.device, clips: int = 64) -> dict[str, float]:
    """Return, over test people: mean PSNR of clips and of faces, dB; the share of freckles and moles that is left.

    That share is of the difference that the marks make in a face's pixels: its projection, after the autoencoder, onto
    what it was before. And the latents' standard deviation.
    """
    people = SPLITS["test"][20_000 : 20_000 + clips]
    seeds = range(TEST_CLIPS, TEST_CLIPS + clips)
    psnr, deviations = [], []
    for start in range(0, clips, 16):
        drawing, _ = draw_clips(people[start : start + 16], seeds[start : start + 16], device)
        video = _video(drawing)
        error = (reconstruct(vae, video) - video).square().mean(dim=(1, 2, 3, 4))
        psnr.append(10 * torch.log10(4 / error))
        like = next(vae.parameters())
        deviations.append(vae.encode(video.to(like)).latent_dist.mean.float().std())
    photos = draw_photos(people, sample_conditions(seeds), device)
    faces = face_image(photos, photos.landmarks_BF52.flatten(0, 1), SIDE)[:, :, None] * 2 - 1
    error = (reconstruct(vae, faces) - faces).square().mean(dim=(1, 2, 3, 4))
    return {
        "clips psnr": float(torch.cat(psnr).mean()),
        "faces psnr": float((10 * torch.log10(4 / error)).mean()),
        "marks left": _marks_left(vae, device),
        "latents deviation": float(torch.stack(deviations).mean()),
    }


def _marks_left(vae: AutoencoderKLCogVideoX, device: torch.device, count: int = 64) -> float:
    people = identity_parameters(torch.tensor(SPLITS["test"][20_000 : 20_000 + 4 * count], device=device))
    marks = [
        number
        for number, name in enumerate(PARAMETERS)
        if name == "freckles" or (name.startswith("mole_") and name.endswith("_size"))
    ]
    marked = people[people[:, marks].sum(dim=1).argsort(descending=True)[:count]]
    bare = marked.clone()
    bare[:, marks] = 0
    scene = scene_curves([ClipCondition(seed=0)] * count, 1, reference=True).to(device)
    videos = [_video(draw_people(identity, scene, SIDE)) for identity in (marked, bare)]
    before = videos[0] - videos[1]
    after = reconstruct(vae, videos[0]) - reconstruct(vae, videos[1])
    return float((before * after).sum() / before.square().sum())
