"""The optimizer beside torch's own, and what it does with bad gradients."""

from __future__ import annotations

import pytest
import torch

from echovideo.training import optimizer
from echovideo.training.optimizer import MasterAdamW
from echovideo.training.settings import AverageSettings
from tests.echovideo.training.small import settings


def _parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in (("a", (5, 3)), ("b", (70,)))}


def _give_gradients(parameters: dict[str, torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


LOSS = torch.ones(1)


def test_step_in_float32_is_torchs_adamw_with_clipped_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_CHUNK_ELEMENTS", 16)
    chosen = settings(weight_decay=0.1, clip_norm=0.5)
    ours, theirs = _parameters(), _parameters()
    own = MasterAdamW(ours.items(), chosen)
    reference = torch.optim.AdamW(theirs.values(), betas=chosen.betas, weight_decay=0.1, eps=1e-8)
    for step in range(5):
        _give_gradients(ours, step)
        _give_gradients(theirs, step)
        reference.param_groups[0]["lr"] = chosen.rate(step)
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
        _, norm, bad = own.step(step, LOSS)
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-6)
        assert float(bad) == 0
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
        assert ours[name].grad is None


def test_step_in_bfloat16_keeps_updates_that_its_rounding_would_lose() -> None:
    parameters, whole = _parameters(torch.bfloat16), _parameters()
    with torch.no_grad():
        for name in whole:
            whole[name].copy_(parameters[name])
    chosen = settings(learning_rate=1e-5, warmup_steps=0, schedule="constant", clip_norm=1e9)
    rounding, exact = MasterAdamW(parameters.items(), chosen), MasterAdamW(whole.items(), chosen)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(300):
        for one in (parameters, whole):
            for name, parameter in one.items():
                parameter.grad = torch.ones_like(parameter) * (1 if name == "a" else -1)
        rounding.step(step, LOSS)
        exact.step(step, LOSS)
    for name in parameters:
        assert torch.equal(rounding.masters[name], whole[name])
        assert torch.equal(parameters[name], whole[name].bfloat16())
    moved = (parameters["b"].detach() - start["b"]).float()
    assert float(moved.mean()) == pytest.approx(300 * 1e-5, rel=0.2)


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_step_with_a_number_that_is_not_finite_changes_nothing(culprit: str, value: float) -> None:
    parameters = _parameters(torch.bfloat16)
    own = MasterAdamW(parameters.items(), settings(average=AverageSettings(decay=0.9)))
    _give_gradients(parameters, 0)
    own.step(0, LOSS)
    before = {
        (kind, name): tensor.clone()
        for kind, group in own.state().items()
        if kind != "updates"
        for name, tensor in group.items()
    }
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _give_gradients(parameters, 1)
    loss = LOSS.clone()
    if culprit == "loss":
        loss[0] = value
    else:
        assert parameters["a"].grad is not None
        parameters["a"].grad[0, 0] = value
    *_, bad = own.step(1, loss)
    assert float(bad) == 1
    for (kind, name), tensor in before.items():
        assert torch.equal(own.state()[kind][name], tensor), (kind, name)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, weights[name])
    assert float(own.updates) == 1


@pytest.mark.parametrize(("device", "every"), [("model", 1), ("cpu", 3)])
def test_average_follows_the_masters_and_is_lent_to_the_model(device: str, every: int) -> None:
    parameters = _parameters(torch.bfloat16)
    average = AverageSettings(decay=0.8, device=device, every=every)  # type: ignore[arg-type]
    own = MasterAdamW(parameters.items(), settings(steps=30, average=average))
    expected = {name: master.clone() for name, master in own.masters.items()}
    for step in range(12):
        _give_gradients(parameters, step)
        own.step(step, LOSS)
        if (step + 1) % every == 0:
            taken = (step + 1) // every
            decay = min(0.8**every, (1 + taken) / (10 + taken))
            for name, master in own.masters.items():
                expected[name] = decay * expected[name] + (1 - decay) * master
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with own.averaged():
        for name, parameter in parameters.items():
            assert torch.allclose(own.averages[name], expected[name], atol=1e-6)
            assert torch.equal(parameter, own.averages[name].bfloat16())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, weights[name])
        assert not torch.equal(parameter, own.averages[name].bfloat16())


def test_average_of_a_float32_model_is_lent_and_taken_back() -> None:
    parameters = _parameters()
    own = MasterAdamW(parameters.items(), settings(average=AverageSettings(decay=0.99)))
    _give_gradients(parameters, 0)
    own.step(0, LOSS)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with own.averaged():
        assert not torch.equal(parameters["a"], weights["a"])
    assert torch.equal(parameters["a"], weights["a"])
    assert torch.equal(own.masters["a"], weights["a"])
