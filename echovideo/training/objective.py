"""The training objective: noise, dropped conditions, and the error of the predicted velocity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from echovideo.errors import TrainingError
from echovideo.hashing import first_uniform, normal
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.sampler import Scheduler
from echovideo.training.batch import NullCondition, Stream, TrainingBatch
from echovideo.training.settings import StageSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoiseSchedule:
    """How much of the signal is left at each timestep, and the VAE's scaling factor of latents.

    `signal_T` and `noise_T` (T,) float32 are sqrt(abar_t) and sqrt(1 - abar_t).
    """

    signal_T: torch.Tensor  # noqa: N815
    noise_T: torch.Tensor  # noqa: N815
    scaling_factor: float

    @classmethod
    def of(cls, scheduler: Scheduler, scaling_factor: float, device: torch.device | str = "cpu") -> NoiseSchedule:
        """Return the schedule that a model folder's scheduler samples by, so that training and rendering agree.

        Raises TrainingError unless its model predicts the velocity.
        """
        if scheduler.config.prediction_type != "v_prediction":
            raise TrainingError(
                f"the scheduler's prediction_type is {scheduler.config.prediction_type!r}; training predicts the "
                "velocity, v_prediction"
            )
        kept = scheduler.alphas_cumprod.double().to(device)
        return cls(signal_T=kept.sqrt().float(), noise_T=(1 - kept).sqrt().float(), scaling_factor=scaling_factor)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """All that chance decides of a batch: timesteps (B,), noise of latents and face, and what is dropped, (B,) bool."""

    timestep_B: torch.Tensor  # noqa: N815
    noise_BFCHW: torch.Tensor  # noqa: N815
    face_noise_BCHW: torch.Tensor  # noqa: N815
    drops_text_B: torch.Tensor  # noqa: N815
    drops_identity_B: torch.Tensor  # noqa: N815
    drops_face_latent_B: torch.Tensor  # noqa: N815


def draw(batch: TrainingBatch, num_timesteps: int, settings: StageSettings) -> Draws:
    """Draw the batch's random numbers, of each example from its own seed: no example's depend on its neighbours."""
    seeds = batch.seed_B
    streams = range(Stream.TIMESTEP, Stream.FACE_LATENT_DROPOUT + 1)
    timestep, text, identity, condition, face_latent = first_uniform(seeds, streams).unbind(1)
    drops_both = condition < settings.condition_dropout
    drops_face_latent = {"off": 1.0, "drop": settings.face_latent_dropout, "on": 0.0}[settings.face_latent]
    latents, face = batch.latents_BFCHW, batch.face_mean_BCHW
    return Draws(
        timestep_B=(timestep * num_timesteps).long(),
        noise_BFCHW=normal(seeds, latents[0].numel(), Stream.NOISE).view(latents.shape),
        face_noise_BCHW=normal(seeds, face[0].numel(), Stream.FACE_NOISE).view(face.shape),
        drops_text_B=drops_both | (text < settings.text_dropout),
        drops_identity_B=drops_both | (identity < settings.identity_dropout),
        drops_face_latent_B=face_latent < drops_face_latent,
    )


def training_loss(
    model: EchoVideoTransformer3DModel,
    schedule: NoiseSchedule,
    batch: TrainingBatch,
    null: NullCondition,
    settings: StageSettings,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a batch, float32, and numbers to record beside it, all still on the device.

    With x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps the model is asked for v = sqrt(abar) eps - sqrt(1 - abar) x_0
    (Salimans and Ho, arXiv 2202.00512); the loss is the mean of (v_hat - v)^2 over the batch, weighed towards
    the face by `face_mask_weight`. "velocity_error" is that mean without weights.
    """
    draws = draw(batch, len(schedule.signal_T), settings)
    dtype = model.patch_embed.proj.weight.dtype
    signal, noise = (table[draws.timestep_B].view(-1, 1, 1, 1, 1) for table in (schedule.signal_T, schedule.noise_T))
    latents = batch.latents_BFCHW.float()
    noisy = signal * latents + noise * draws.noise_BFCHW
    velocity = signal * draws.noise_BFCHW - noise * latents

    text, face_tokens, embedding = _condition(batch, null, draws, dtype)
    _, num_frames, _, height, width = latents.shape
    patch = model.config.patch_size
    (predicted,) = model(
        torch.cat([noisy, _placed_face(batch, schedule, draws)], dim=2).to(dtype),
        text,
        face_tokens,
        embedding,
        draws.timestep_B,
        _rotary(num_frames, height // patch, width // patch, model.config.attention_head_dim, latents.device),
        return_dict=False,
    )
    error = (predicted.float() - velocity).square()
    weight = face_weight(batch.face_share_BFHW, settings.face_mask_weight)[:, :, None]
    loss = (error * weight).mean()
    return loss, {"velocity_error": error.detach().mean()}


def face_weight(face_share_BFHW: torch.Tensor, amount: float) -> torch.Tensor:
    """Return weights (B, F, h, w) float32 of mean 1 an example: 1 + amount * face share, over their mean."""
    weight = 1 + amount * face_share_BFHW.float()
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def _condition(
    batch: TrainingBatch, null: NullCondition, draws: Draws, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drops_text, drops_identity = draws.drops_text_B[:, None, None], draws.drops_identity_B[:, None, None]
    text = torch.where(drops_text, null.text_1ND.to(dtype), batch.text_BND.to(dtype))
    face_tokens = torch.where(drops_identity, null.face_tokens_1ND.to(dtype), batch.face_tokens_BND.to(dtype))
    embedding = batch.embedding_BD.to(dtype)
    return text, face_tokens, torch.where(draws.drops_identity_B[:, None], torch.zeros_like(embedding), embedding)


def _placed_face(batch: TrainingBatch, schedule: NoiseSchedule, draws: Draws) -> torch.Tensor:
    """Return (B, F, 16, h, w) float32: a sample of the face's latents in the first frame, or zeros if it is dropped."""
    face = batch.face_mean_BCHW.float() + batch.face_std_BCHW.float() * draws.face_noise_BCHW
    face = torch.where(draws.drops_face_latent_B.view(-1, 1, 1, 1), 0.0, face * schedule.scaling_factor)
    return F.pad(face[:, None], (0, 0, 0, 0, 0, 0, 0, batch.latents_BFCHW.shape[1] - 1))


@lru_cache(maxsize=16)
def _rotary(
    num_frames: int, grid_height: int, grid_width: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(num_frames, grid_height, grid_width, head_dim, device)
