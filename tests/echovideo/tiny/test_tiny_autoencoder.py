from __future__ import annotations

import itertools
import sys
import time
from functools import partial

import pytest
import torch

from echovideo.tiny import autoencoder
from echovideo.tiny.autoencoder import (
    AutoencoderSettings,
    Phase,
    _backward,
    drawn_videos,
    reconstruct,
    train_autoencoder,
    whiten,
)
from echovideo.tiny.parts import fresh_vae
from echovideo.tiny.progress import timed_settings
from echovideo.tiny.shipped import load_vae
from echovideo.training.graphed import GraphedGradients
from echovideo.training.optimizer import MasterAdamW

SIDE = 32


def examples(device: str = "cpu", clips: int = 2) -> tuple[torch.Tensor, ...]:
    """Smooth pictures, weights and the latents' noise: clips of 9 frames and faces."""
    generator = torch.Generator().manual_seed(0)

    def smooth(frames: int) -> torch.Tensor:
        coarse = torch.rand(clips, 3, 1, 4, 4, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=(frames, SIDE, SIDE), mode="trilinear")

    def noise(frames: int) -> torch.Tensor:
        return torch.randn(clips, 16, frames, SIDE // 8, SIDE // 8, generator=generator).bfloat16()

    tensors = smooth(9), torch.ones(clips, 9, SIDE, SIDE), noise(3), smooth(1), noise(1)
    return tuple(tensor.to(device) for tensor in tensors)


def test_autoencoder_a_few_steps_lower_loss_and_error() -> None:
    torch.manual_seed(0)
    vae = fresh_vae().bfloat16().train()
    optimizer = MasterAdamW(vae.named_parameters(), timed_settings("autoencoder", 2, 2e-3, decay=0.9))
    found = []
    for _ in range(12):
        numbers = _backward(vae, 1e-4, *examples())
        optimizer.step(500, numbers[:1])
        found.append(numbers)
    first, last = found[0], found[-1]
    assert float(last[0]) < 0.8 * float(first[0])
    assert float(last[1]) < 0.8 * float(first[1])


def test_autoencoder_gradients_are_of_clips_and_faces_together() -> None:
    torch.manual_seed(0)
    vae = fresh_vae().bfloat16()
    clips, weights, noise, faces, face_noise = examples()
    gradients = []
    for shown in (faces, -faces):
        _backward(vae, 0.0, clips, weights, noise, shown, face_noise)
        gradient = vae.decoder.conv_out.conv.weight.grad
        assert gradient is not None
        gradients.append(gradient.float())
        vae.zero_grad()
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-3


@pytest.mark.gpu
def test_graphed_gradients_are_those_of_the_function() -> None:
    torch.manual_seed(0)
    vae = fresh_vae().cuda().bfloat16()
    backward, parameters = partial(_backward, vae, 1e-4), list(vae.parameters())
    inputs = examples("cuda")
    # Captured with other numbers than it is replayed with.
    graphed = GraphedGradients(backward, parameters, [torch.zeros_like(tensor) for tensor in inputs])
    for repeated in range(2):
        replayed = graphed(*inputs).clone()
        gradients = [parameter.grad.clone() for parameter in parameters]
        vae.zero_grad()
        torch.testing.assert_close(replayed, backward(*inputs), rtol=1e-2, atol=1e-2)
        for gradient, parameter in zip(gradients, parameters, strict=True):
            scale = float(parameter.grad.float().abs().max())
            assert float((gradient - parameter.grad).abs().max()) <= 0.05 * scale + 1e-6, repeated
        vae.zero_grad()


def test_train_autoencoder_runs_through_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that a second passes on each time that it is read says how many steps fit.
    ticks = itertools.count(time.perf_counter())
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(autoencoder, "SIDE", SIDE)
    monkeypatch.setattr(autoencoder, "FRAMES", 9)
    monkeypatch.setattr(sys.modules["echovideo.tiny.drawing"], "SIDE", SIDE)
    monkeypatch.setattr(sys.modules["echovideo.tiny.drawing"], "REFERENCE_SIDE", SIDE)
    shapes = []

    def seen(vae: object, kl_weight: float, clips: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(clips.shape))
        return _backward(vae, kl_weight, clips, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(autoencoder, "_backward", seen)
    monkeypatch.setattr(autoencoder, "draw_clips", partial(autoencoder.draw_clips, frames=9))
    settings = AutoencoderSettings(
        seconds=12,
        phases=(Phase(until=0.5, clips=1, frames=1, side=16), Phase(until=1, clips=2, frames=9, side=SIDE)),
        fresh=2,
        kept=4,
    )
    vae = train_autoencoder(settings, torch.device("cpu"))
    assert list(dict.fromkeys(shapes)) == [(1, 3, 1, 16, 16), (2, 3, 9, SIDE, SIDE)]
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_train_autoencoder_decoder_alone_leaves_the_encoder_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(time.perf_counter())
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(autoencoder, "SIDE", SIDE)
    monkeypatch.setattr(autoencoder, "FRAMES", 9)
    monkeypatch.setattr(sys.modules["echovideo.tiny.drawing"], "SIDE", SIDE)
    monkeypatch.setattr(sys.modules["echovideo.tiny.drawing"], "REFERENCE_SIDE", SIDE)
    monkeypatch.setattr(autoencoder, "draw_clips", partial(autoencoder.draw_clips, frames=9))
    phases = (Phase(until=1, clips=1, frames=1, side=16),)
    settings = AutoencoderSettings(seconds=8, phases=phases, fresh=2, kept=4)
    start = fresh_vae()
    before = {name: tensor.bfloat16() for name, tensor in start.state_dict().items()}
    trained = train_autoencoder(settings, torch.device("cpu"), start, decoder_alone=True).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in before.items() if name.startswith("encoder"))
    assert not torch.equal(trained["decoder.conv_out.conv.weight"], before["decoder.conv_out.conv.weight"])


def test_whiten_makes_second_moments_the_identity_and_leaves_the_pictures() -> None:
    vae = load_vae().requires_grad_(False)
    (videos,) = (clips[:, :, :9] for clips in drawn_videos(range(2), range(2), torch.device("cpu")))
    before = reconstruct(vae, videos)
    for _ in range(2):  # What was whitened before can be whitened again.
        whiten(vae, videos.split(1))
        posterior = vae.encode(videos).latent_dist
        latents_ND = posterior.mean.transpose(0, 1).flatten(1).T
        assert (latents_ND.T @ latents_ND / len(latents_ND) - torch.eye(16)).abs().max() < 5e-3
        # The noise that the decoder was trained to bear is a few hundredths of a direction's size.
        assert posterior.std.min() > 1e-4
        assert posterior.std.max() < 0.1
        assert (reconstruct(vae, videos) - before).abs().max() < 1e-3
