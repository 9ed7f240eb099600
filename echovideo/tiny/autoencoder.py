"""Trains the tiny model's video autoencoder on drawn clips and faces, and measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor

from echovideo.conditioning import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from echovideo.synthetic.clip import ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing, draw_tensors
from echovideo.synthetic.person import PARAMETERS, SPLITS, identity_parameters
from echovideo.tiny.drawing import TEST_CLIPS, draw_clips, draw_photos, noisy_points
from echovideo.tiny.faces import face_image
from echovideo.tiny.parts import FRAMES, SIDE, fresh_vae
from echovideo.tiny.progress import THOUSANDTHS, Progress, timed_settings
from echovideo.training.graphed import GraphedGradients
from echovideo.training.optimizer import MasterAdamW

_ROUGHNESS = 0.05
"""Errors below it count squared. An absolute error's best guess is a median, which freckles do not move."""
_EDGE_WEIGHT = 0.5
_FACE_WEIGHT = 0.25
# A draw takes as long as some steps, and a clip is cut anew each time that it is read.
_DRAW_EVERY = 64
_CHUNK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of the training, until a share `until` of its time is over: `clips` clips a step, `frames` long.

    They are cut to `side` pixels square.
    """

    until: float
    clips: int
    frames: int = FRAMES
    side: int = SIDE


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderSettings:
    """How the autoencoder is trained: on small pieces first, which cost less, then on whole clips.

    A step's pieces are few: each holds hundreds of latent cells, and many steps do more than exact gradients. Every
    64th step draws `fresh` clips and faces into a store of the last `kept`; all take theirs from there.
    `kl_weight` multiplies the mean divergence of a latent number from the normal distribution.
    """

    seconds: float
    seed: int = 1
    phases: tuple[Phase, ...] = (
        Phase(until=0.35, clips=24, frames=9, side=64),
        Phase(until=0.75, clips=16, side=64),
        Phase(until=1.0, clips=16),
    )
    fresh: int = 64
    kept: int = 1536
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4


class _Store:
    """The last drawn clips and faces, on the device as bytes, and what each pixel's error weighs."""

    def __init__(self, settings: AutoencoderSettings, device: torch.device, generator: torch.Generator) -> None:
        self._settings, self._device, self._generator = settings, device, generator
        self._drawn = 0
        # BCFHW, and what each pixel weighs.
        self._clips = torch.empty(settings.kept, 3, FRAMES, SIDE, SIDE, dtype=torch.uint8, device=device)
        self._weights = torch.empty(settings.kept, FRAMES, SIDE, SIDE, dtype=torch.float16, device=device)
        self._faces = torch.empty(settings.kept, 3, 1, SIDE, SIDE, dtype=torch.uint8, device=device)

    def draw(self) -> None:
        """Draw new clips and faces in the place of the oldest."""
        settings, device = self._settings, self._device
        seeds = range(self._drawn, self._drawn + settings.fresh)
        people = [SPLITS["train"][seed % len(SPLITS["train"])] for seed in seeds]
        drawing, conditions = draw_clips(people, seeds, device)
        photos = draw_photos(people, conditions, device)
        faces = face_image(photos, noisy_points(photos, self._generator), SIDE)
        at = torch.arange(self._drawn, self._drawn + settings.fresh, device=device) % settings.kept
        self._clips[at] = _as_bytes(drawing.frames_BFCHW.transpose(1, 2))
        self._weights[at] = 0.75 + 0.75 * drawing.face_BFHW.half()
        self._faces[at] = _as_bytes(faces[:, :, None])
        self._drawn += settings.fresh

    def take(self, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips (B, 3, F, side, side) and faces (B, 3, 1, 96, 96), -1 to 1, and the weight of clips' pixels."""
        available = min(self._drawn, self._settings.kept)

        def chosen() -> Tensor:
            return torch.randint(available, (phase.clips,), generator=self._generator, device=self._device)

        def cut(whole: int, part: int) -> slice:
            # On the CPU, so that nothing waits for the device.
            start = int(torch.randint(whole - part + 1, ()))
            return slice(start, start + part)

        at = chosen()
        frames, rows, columns = cut(FRAMES, phase.frames), cut(SIDE, phase.side), cut(SIDE, phase.side)
        clips = self._clips[at, :, frames, rows, columns].float() / 127.5 - 1
        faces = self._faces[chosen()].float() / 127.5 - 1
        return clips, self._weights[at, frames, rows, columns].float(), faces


def train_autoencoder(
    settings: AutoencoderSettings,
    device: torch.device,
    start: AutoencoderKLCogVideoX | None = None,
    *,
    decoder_alone: bool = False,
) -> AutoencoderKLCogVideoX:
    """Return the autoencoder with averaged weights, bfloat16 on `device`; `start` goes on from other weights.

    With `decoder_alone` the encoder stays as it is, so that a model of its latents does too.
    """
    torch.manual_seed(settings.seed)
    vae = (start or fresh_vae()).to(device, torch.bfloat16).train().requires_grad_(True)
    if decoder_alone:
        vae.encoder.requires_grad_(False)
    told = timed_settings("autoencoder", settings.phases[-1].clips, settings.learning_rate, decay=0.998)
    optimizer = MasterAdamW(vae.named_parameters(), told)
    generator = torch.Generator(device).manual_seed(settings.seed)
    store = _Store(settings, device, generator)
    for _ in range(max(1, settings.kept // settings.fresh // 4)):
        store.draw()

    def noise(video_BCFHW: Tensor) -> Tensor:
        frames = 1 + (video_BCFHW.shape[2] - 1) // TEMPORAL_COMPRESSION
        height, width = (side // SPATIAL_COMPRESSION for side in video_BCFHW.shape[3:])
        shape = (len(video_BCFHW), vae.config.latent_channels, frames, height, width)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    backward: Callable[..., Tensor] = partial(_backward, vae, settings.kl_weight)
    step, shape = backward, None
    progress = Progress(name="autoencoder", seconds=settings.seconds)
    while (share := progress.share) < 1:
        if progress.steps % _DRAW_EVERY == 0:
            store.draw()
        clips, weights, faces = store.take(next(phase for phase in settings.phases if share < phase.until))
        inputs = clips, weights, noise(clips), faces, noise(faces)
        if device.type == "cuda" and shape != clips.shape:
            step = backward  # The last phase's graph gives its memory back first.
            trained = list(optimizer.parameters.values())
            step, shape = GraphedGradients(backward, trained, inputs), clips.shape
        loss, error, face_error = step(*inputs)
        (loss,), norm, _ = optimizer.step(int(share * THOUSANDTHS), loss[None])
        # From -1 to 1 the range is 2.
        progress.stepped(
            loss=loss,
            gradient=norm,
            psnr=10 * torch.log10(4 / error),
            faces=10 * torch.log10(4 / face_error),
        )
    optimizer.finish()
    return vae.eval().requires_grad_(False)


def _backward(
    vae: AutoencoderKLCogVideoX,
    kl_weight: float,
    clips_BCFHW: Tensor,
    weight_BFHW: Tensor,
    noise_BCFHW: Tensor,
    faces_BCFHW: Tensor,
    face_noise_BCFHW: Tensor,
) -> Tensor:
    """Leave the gradients of clips and faces together in the parameters; return the loss and both squared errors."""
    loss, error = _loss(vae, clips_BCFHW, weight_BFHW, noise_BCFHW, kl_weight)
    face_weight = torch.full_like(faces_BCFHW[:, 0], _FACE_WEIGHT)
    face_loss, face_error = _loss(vae, faces_BCFHW, face_weight, face_noise_BCFHW, kl_weight)
    loss = loss + face_loss
    loss.backward()
    return torch.stack([loss.detach(), error, face_error])


def _loss(
    vae: AutoencoderKLCogVideoX, video_BCFHW: Tensor, weight_BFHW: Tensor, noise_BCFHW: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of a video and the mean squared error that is part of it."""
    posterior = vae.encode(video_BCFHW.bfloat16()).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise_BCFHW).sample.float()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = reconstruction_loss(decoded, video_BCFHW, weight_BFHW) + kl_weight * divergence
    return loss, F.mse_loss(decoded.detach(), video_BCFHW)


def reconstruction_loss(decoded_BCFHW: Tensor, video_BCFHW: Tensor, weight_BFHW: Tensor) -> Tensor:
    """Return the weighted mean of a smooth absolute error (Charbonnier) of pixels and of their differences."""
    difference = decoded_BCFHW - video_BCFHW
    weight = weight_BFHW[:, None]
    pixels = (torch.sqrt(difference.square() + _ROUGHNESS**2) * weight).mean()
    across = torch.sqrt(difference.diff(dim=-1).square() + _ROUGHNESS**2).mean()
    down = torch.sqrt(difference.diff(dim=-2).square() + _ROUGHNESS**2).mean()
    return pixels + _EDGE_WEIGHT * (across + down)


def _video(drawing: Drawing) -> Tensor:
    return drawing.frames_BFCHW.transpose(1, 2) * 2 - 1


def _as_bytes(picture: Tensor) -> Tensor:
    return (picture * 255).round().byte()


@torch.inference_mode()
def reconstruct(vae: AutoencoderKLCogVideoX, video_BCFHW: Tensor) -> Tensor:
    """Return what the autoencoder makes of a video from its posterior's mean, -1 to 1."""
    like = next(vae.parameters())
    mean = vae.encode(video_BCFHW.to(like)).latent_dist.mean
    decoded: Tensor = vae.decode(mean).sample.float().clamp(-1, 1)
    return decoded


@torch.no_grad()
def whiten(vae: AutoencoderKLCogVideoX, videos_BCFHW: Iterable[Tensor]) -> None:
    """Make the second moments of the latents' cells over these videos, -1 to 1, the identity; decoded pictures stay.

    Diffusion adds the same noise to every number, and a direction of small deviation drowns in it. What is small in a
    picture, a smile or a mole, lies in such directions. The encoder's last layer takes a linear map, and the layers of
    the decoder that read latents its inverse. The mean is not taken out: the decoder pads latents with zeros. It stays
    in one direction. The posterior's variances, which a map mixes, become their mean over the cells.
    """
    posteriors = [vae.encode(video.to(next(vae.parameters()))).latent_dist for video in videos_BCFHW]

    def cells(latents: list[Tensor]) -> Tensor:
        return torch.cat([one.double().transpose(0, 1).flatten(1) for one in latents], dim=1).T

    latents_ND = cells([posterior.mean for posterior in posteriors])
    moments_D, directions_DD = torch.linalg.eigh(latents_ND.T @ latents_ND / len(latents_ND))
    inverse_DD = directions_DD * moments_D.sqrt()
    whitening_DD = (directions_DD / moments_D.sqrt()).T
    noise_D = whitening_DD.square() @ cells([posterior.var for posterior in posteriors]).mean(dim=0)

    last, channels = vae.encoder.conv_out.conv, len(noise_D)
    for wrote in (last.weight, last.bias):
        wrote[:channels] = torch.einsum("ij,j...->i...", whitening_DD, wrote[:channels].double())
    last.weight[channels:] = 0
    last.bias[channels:] = noise_D.log()
    norms = [layer for layer in vae.decoder.modules() if isinstance(layer, CogVideoXSpatialNorm3D)]
    for layer in (vae.decoder.conv_in, *(one for norm in norms for one in (norm.conv_y, norm.conv_b))):
        layer.conv.weight.copy_(torch.einsum("oj...,ji->oi...", layer.conv.weight.double(), inverse_DD))


def drawn_videos(people: range, clips: range, device: torch.device) -> Iterator[Tensor]:
    """Yield the clips of seeds `clips`, each of the person beside it, (B, 3, 17, 96, 96), -1 to 1."""
    for start in range(0, len(people), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield _video(draw_clips(people[chunk], clips[chunk], device)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderMeasures:
    """Mean PSNR of clips and of faces, dB; the share of freckles and moles that is left; the latents' deviation.

    That share is of the difference that the marks make in a face's pixels: its projection, after the autoencoder, onto
    what it was before.
    """

    clips_psnr: float
    faces_psnr: float
    marks_left: float
    latents_deviation: float


@torch.inference_mode()
def measure_autoencoder(vae: AutoencoderKLCogVideoX, device: torch.device, clips: int = 64) -> AutoencoderMeasures:
    """Return what the autoencoder keeps of test people."""
    people = SPLITS["test"][20_000 : 20_000 + clips]
    seeds = range(TEST_CLIPS, TEST_CLIPS + clips)
    psnr, deviations = [], []
    for video in drawn_videos(people, seeds, device):
        error = (reconstruct(vae, video) - video).square().mean(dim=(1, 2, 3, 4))
        psnr.append(10 * torch.log10(4 / error))
        like = next(vae.parameters())
        deviations.append(vae.encode(video.to(like)).latent_dist.mean.float().std())
    photos = draw_photos(people, sample_conditions(seeds), device)
    faces = face_image(photos, photos.landmarks_BF52.flatten(0, 1), SIDE)[:, :, None] * 2 - 1
    error = (reconstruct(vae, faces) - faces).square().mean(dim=(1, 2, 3, 4))
    return AutoencoderMeasures(
        clips_psnr=float(torch.cat(psnr).mean()),
        faces_psnr=float((10 * torch.log10(4 / error)).mean()),
        marks_left=_marks_left(vae, device),
        latents_deviation=float(torch.stack(deviations).mean()),
    )


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
    videos = [_video(draw_tensors(identity, scene, SIDE, SIDE)) for identity in (marked, bare)]
    before = videos[0] - videos[1]
    after = reconstruct(vae, videos[0]) - reconstruct(vae, videos[1])
    return float((before * after).sum() / before.square().sum())
