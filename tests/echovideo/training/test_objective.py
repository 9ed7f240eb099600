"""The loss, and what chance decides of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from echovideo.conditioning import fuse_condition, place_face_latents
from echovideo.errors import TrainingError
from echovideo.model.rotary import rotary_tables
from echovideo.tiny.parts import scheduler
from echovideo.training.batch import Stream
from echovideo.training.objective import NoiseSchedule, draw, face_weight, training_loss
from echovideo.training.settings import base
from tests.echovideo.training.small import (
    make_batch,
    null_condition,
    schedule,
    settings,
    slice_of,
    small_model,
)

SEEDS = torch.arange(40, 44)
ONCE = {"text_dropout": 0.0, "identity_dropout": 0.0, "condition_dropout": 0.0, "face_latent": "on"}


def test_training_loss_without_weights_is_the_weighted_error_of_the_clean_latents() -> None:
    model, batch, chosen = small_model(), make_batch(SEEDS), settings(**ONCE)
    loss, _ = training_loss(model, schedule(), batch, null_condition(), chosen)

    published = scheduler()
    kept = published.alphas_cumprod.double()
    draws = draw(batch, 1000, chosen)
    noisy = published.add_noise(batch.latents_BFCHW, draws.noise_BFCHW, draws.timestep_B)
    faces = 0.7 * (batch.face_mean_BCHW + batch.face_std_BCHW * draws.face_noise_BCHW)
    placed = torch.cat([place_face_latents(face, 2) for face in faces])
    (velocity,) = model(
        torch.cat([noisy, placed], dim=2),
        batch.text_BND,
        batch.face_tokens_BND,
        batch.embedding_BD,
        draws.timestep_B,
        rotary_tables(2, 2, 3, 32),
        return_dict=False,
    )
    abar = kept[draws.timestep_B].view(-1, 1, 1, 1, 1)
    clean = abar.sqrt() * noisy.double() - (1 - abar).sqrt() * velocity.double()
    weighted = ((clean - batch.latents_BFCHW.double()).square() / (1 - abar)).mean()
    assert float(loss.detach()) == pytest.approx(float(weighted.detach()), rel=1e-5)


def test_draw_of_a_batch_in_another_order_and_in_parts_is_the_same() -> None:
    batch, chosen = make_batch(torch.arange(12)), settings(text_dropout=0.5, identity_dropout=0.5)
    whole = draw(batch, 1000, chosen)
    for places in (slice(0, 5), slice(5, 12), torch.tensor([7, 3, 11])):
        part = draw(slice_of(batch, places), 1000, chosen)
        for name in part.__slots__:
            assert torch.equal(getattr(part, name), getattr(whole, name)[places]), name


def test_draw_of_many_examples_has_normal_noise_and_even_timesteps() -> None:
    draws = draw(make_batch(torch.arange(2000)), 1000, settings())
    counts = torch.bincount(draws.timestep_B // 100, minlength=10)
    assert (draws.timestep_B.min() >= 0) & (draws.timestep_B.max() <= 999)
    assert ((counts - 200).abs() < 5 * 14).all()
    noise = torch.cat([draws.noise_BFCHW.flatten(1), draws.face_noise_BCHW.flatten(1)], dim=1)
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / noise.numel()) ** 0.5
    correlations = torch.corrcoef(noise[:, ::40].T).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / 2000**0.5


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"face_latent": "drop", "face_latent_dropout": 0.3, "condition_dropout": 0.1}, (0.1, 0.1, 0.1, 0.3)),
        (
            {"text_dropout": 0.2, "identity_dropout": 0.4, "condition_dropout": 0.1, "face_latent": "on"},
            (0.28, 0.46, 0.172, 0.0),
        ),
        ({"condition_dropout": 0.0, "face_latent": "off"}, (0.0, 0.0, 0.0, 1.0)),
    ],
)
def test_draw_drops_conditions_at_their_rates(
    changes: dict[str, object], rates: tuple[float, float, float, float]
) -> None:
    draws = draw(make_batch(torch.arange(4000), frames=1, height=2, width=2), 1000, settings(**changes))
    text, identity, latent = draws.drops_text_B, draws.drops_identity_B, draws.drops_face_latent_B
    for found, rate in zip((text, identity, text & identity, latent), rates, strict=True):
        assert abs(float(found.float().mean()) - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5


def test_training_loss_with_dropped_condition_uses_guidances_unconditional_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch, null = small_model(), make_batch(SEEDS), null_condition()
    torch.nn.init.normal_(model.text_proj.weight)
    seen: list[torch.Tensor] = []
    denoise = model.denoise

    def recorded(hidden_states: torch.Tensor, condition: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.extend([hidden_states, condition])
        return denoise(hidden_states, condition, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "denoise", recorded)
    training_loss(model, schedule(), batch, null, settings(condition_dropout=1.0, face_latent="off"))
    published = fuse_condition(
        model,
        prompt_embeds=batch.text_BND[:1],
        negative_prompt_embeds=null.text_1ND,
        empty_face_tokens=null.face_tokens_1ND,
        face_tokens=batch.face_tokens_BND[:1],
        face_embedding=batch.embedding_BD[:1],
    )
    assert torch.allclose(seen[1], published[:1].expand(4, -1, -1), rtol=0, atol=1e-6)
    assert seen[0][:, :, 16:].abs().max() == 0


@torch.no_grad()
def test_training_loss_of_the_base_stage_knows_the_text_and_nothing_of_the_person() -> None:
    model, batch, null = small_model(), make_batch(SEEDS), null_condition()
    torch.nn.init.normal_(model.text_proj.weight)
    torch.nn.init.normal_(model.patch_embed.proj.weight)
    chosen = base(steps=1, batch_size=4, condition_dropout=0.0)

    def loss(**changes: torch.Tensor) -> float:
        return float(training_loss(model, schedule(), replace(batch, **changes), null, chosen)[0])

    other = make_batch(SEEDS + 100)
    assert loss(face_tokens_BND=other.face_tokens_BND, embedding_BD=other.embedding_BD) == loss()
    assert loss(face_mean_BCHW=other.face_mean_BCHW) == loss()
    assert loss(text_BND=other.text_BND) != loss()


@torch.no_grad()
def test_training_loss_with_face_weight_counts_the_face_more() -> None:
    model, batch = small_model(), make_batch(SEEDS)
    share = torch.zeros_like(batch.face_share_BFHW)
    share[:, :, :2] = 1
    batch = replace(batch, face_share_BFHW=share)
    plain, weighted = (
        training_loss(model, schedule(), batch, null_condition(), settings(face_mask_weight=amount, **ONCE))
        for amount in (0.0, 3.0)
    )
    assert float(plain[0]) == pytest.approx(float(weighted[1]["velocity_error"]), rel=1e-6)
    everything_seen = replace(batch, face_share_BFHW=torch.ones_like(share))
    same, _ = training_loss(
        model, schedule(), everything_seen, null_condition(), settings(face_mask_weight=3.0, **ONCE)
    )
    assert float(same) == pytest.approx(float(plain[0]), rel=1e-6)

    assert face_weight(share, 3.0)[0, 0, :, 0].tolist() == pytest.approx([1.6, 1.6, 0.4, 0.4])
    assert face_weight(torch.zeros_like(share), 3.0).unique().tolist() == [1.0]


def test_noise_schedule_ends_without_signal() -> None:
    table = schedule()
    assert (float(table.signal_T[-1]), float(table.noise_T[-1])) == (0.0, 1.0)
    assert torch.allclose(table.signal_T**2 + table.noise_T**2, torch.ones(1000), atol=1e-6)


def test_noise_schedule_of_a_noise_predicting_model_is_refused() -> None:
    with pytest.raises(TrainingError, match="prediction_type is 'epsilon'"):
        NoiseSchedule.of(CogVideoXDDIMScheduler(prediction_type="epsilon"), 0.7)


def test_streams_of_an_example_at_the_published_size_do_not_overlap() -> None:
    noise, face = 13 * 16 * 60 * 106, 16 * 60 * 106
    assert Stream.REFERENCE < Stream.FACE_NOISE
    assert (Stream.FACE_NOISE << 12) + face < Stream.NOISE << 12
    assert (Stream.NOISE << 12) + noise < Stream.LATENTS << 12
    assert (Stream.LATENTS << 12) + noise < 1 << 32
