"""Adapters: training, the file, and merging into a model that renders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echovideo.errors import StorageError, WeightsError
from echovideo.model.fusion import IdentityImageTextFusion
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.adapters import Adapter, AdapterCard, AdapterSlot, add_adapter, merge, unmerge
from echovideo.training.checkpoint import Checkpoints, load_weights
from echovideo.training.groups import group_of
from echovideo.training.loop import train
from echovideo.training.settings import AdapterSettings, AverageSettings
from tests.echovideo.training.small import (
    CONFIG,
    Kept,
    SmallSource,
    make_batch,
    null_condition,
    schedule,
    settings,
    small_model,
)

LORA = AdapterSettings(rank=3, groups=("attention", "feed_forward"))
CHOSEN = settings(groups=("fusion",), adapter=LORA, learning_rate=1e-2)


@torch.no_grad()
def _trained(dtype: torch.dtype = torch.float32) -> tuple[EchoVideoTransformer3DModel, Adapter]:
    """A model as if it had been trained for long, and its adapter."""
    model = small_model()
    add_adapter(model, LORA, seed=0)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_up") or group_of(name) == "fusion":
            parameter.normal_(std=0.3)
    model.to(dtype)
    return model, Adapter.of(model, CHOSEN, base_digest="d" * 64, licence="CC BY-NC 4.0", consent_id="c-17")


@torch.no_grad()
def _velocity(model: EchoVideoTransformer3DModel) -> torch.Tensor:
    batch, dtype = make_batch(torch.arange(4)), model.proj_out.weight.dtype
    face = torch.zeros_like(batch.latents_BFCHW)
    (velocity,) = model(
        torch.cat([batch.latents_BFCHW, face], dim=2).to(dtype),
        batch.text_BND.to(dtype),
        batch.face_tokens_BND.to(dtype),
        batch.embedding_BD.to(dtype),
        torch.tensor([10, 300, 600, 999]),
        rotary_tables(2, 2, 3, CONFIG.attention_head_dim),
        return_dict=False,
    )
    return velocity.float()


def test_add_adapter_leaves_the_output_and_the_names_as_they_are() -> None:
    model, plain = small_model(), small_model()
    add_adapter(model, LORA, seed=0)
    assert torch.equal(_velocity(model), _velocity(plain))
    added = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(added.pop(name), parameter), name
    assert len(added) == CONFIG.num_layers * 5 * 2
    assert added["transformer_blocks.1.ff.net.2.lora_down"].shape == (3, 4 * CONFIG.inner_dim)
    assert added["transformer_blocks.0.attn1.to_out.0.lora_up"].shape == (CONFIG.inner_dim, 3)
    downs = [value for name, value in added.items() if name.endswith("to_q.lora_down")]
    assert float(downs[0].detach().var()) == pytest.approx(1 / CONFIG.inner_dim, rel=0.3)
    assert not torch.equal(*downs)


def test_train_of_an_adapter_and_fusion_moves_these_and_nothing_else() -> None:
    model = small_model()
    train(model, schedule(), SmallSource(), null_condition(), CHOSEN)
    adapter = Adapter.of(model, CHOSEN, base_digest="d" * 64, licence="CC BY-NC 4.0", consent_id=None)
    start = dict(small_model().named_parameters())
    moved = {name for name, value in model.named_parameters() if name in start and not torch.equal(value, start[name])}
    assert {group_of(name) for name in moved} == {"fusion"}
    ups = {name: value for name, value in adapter.tensors.items() if name.endswith("lora_up")}
    assert len(ups) == 10
    assert all(float(value.abs().max()) > 0 for value in ups.values())
    assert adapter.tensors.keys() == moved | {name for name, _ in model.named_parameters() if "lora" in name}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merge_renders_as_trained_and_unmerge_restores_the_base_to_the_bit(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    trained, adapter = _trained(dtype)
    adapter.save(tmp_path / "person.safetensors")
    loaded = Adapter.load(tmp_path / "person.safetensors")
    assert loaded.card == AdapterCard(
        rank=3,
        groups=("fusion",),
        adapted_groups=("attention", "feed_forward"),
        base_digest="d" * 64,
        licence="CC BY-NC 4.0",
        consent_id="c-17",
    )
    model, base = small_model().to(dtype), small_model().to(dtype)
    replaced = merge(model, loaded, "d" * 64)
    moved = (_velocity(trained) - _velocity(base)).norm()
    assert float((_velocity(model) - _velocity(trained)).norm() / moved) < tolerance
    assert float(moved / _velocity(base).norm()) > 0.1
    unmerge(model, replaced)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name


def test_merge_into_fusion_alone_takes_its_part() -> None:
    trained, adapter = _trained()
    fusion = IdentityImageTextFusion(CONFIG)
    replaced = merge(fusion, adapter, "d" * 64)
    assert torch.equal(fusion.text_proj.weight, trained.text_proj.weight)
    assert replaced.keys() == {name for name, _ in fusion.named_parameters()}


def test_merge_of_an_adapter_that_does_not_fit_changes_nothing_and_says_why() -> None:
    _, adapter = _trained()
    model, base = small_model(), small_model()
    with pytest.raises(WeightsError, match="belongs to the model dddddddddddddddd, and this one is eeee"):
        merge(model, adapter, "e" * 64)
    up = "transformer_blocks.1.ff.net.2.lora_up"
    lacking = replace(adapter, tensors={name: t for name, t in adapter.tensors.items() if name != up})
    with pytest.raises(WeightsError, match=f"lacks '{up}'"):
        merge(model, lacking, "d" * 64)
    wider = replace(adapter, tensors=adapter.tensors | {"text_proj.bias": torch.zeros(9)})
    with pytest.raises(WeightsError, match=r"'text_proj.bias' has shape \(9,\), not \(6,\)"):
        merge(model, wider, "d" * 64)
    longer = replace(adapter, tensors=adapter.tensors | {"transformer_blocks.7.ff.net.2.bias": torch.zeros(64)})
    with pytest.raises(WeightsError, match=r"changes 'transformer_blocks.7.ff.net.2.bias', which"):
        merge(model, longer, "d" * 64)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _strip(path: Path) -> None:
    save_file(load_file(path), path)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"), [(_cut, "truncated"), (_strip, "is no adapter file"), (_remove, "missing")]
)
def test_load_of_a_spoilt_adapter_file_names_it(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "person.safetensors"
    _trained()[1].save(path)
    spoil(path)
    with pytest.raises(WeightsError, match=message) as caught:
        Adapter.load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("average", [None, AverageSettings(decay=0.9)])
def test_load_weights_of_a_checkpoint_gives_what_was_trained(tmp_path: Path, average: AverageSettings | None) -> None:
    chosen, kept = replace(CHOSEN, average=average), Kept()
    checkpoints = Checkpoints(tmp_path, chosen, "base")
    seen: dict[str, torch.Tensor] = {}

    def validate(model: EchoVideoTransformer3DModel, steps: int) -> dict[str, float]:
        seen.update({name: value.detach().clone() for name, value in model.named_parameters()})
        return {"score": 1.0}

    chosen = replace(chosen, validate_every=6)
    train(
        small_model(),
        schedule(),
        SmallSource(),
        null_condition(),
        chosen,
        checkpoints=checkpoints,
        record=kept,
        validate=validate,
    )
    model = small_model()
    add_adapter(model, LORA, seed=0)
    path = checkpoints.best()
    assert path is not None
    assert load_weights(model, path).steps == 6
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, seen[name]), name


def test_slot_holds_one_adapter_and_gives_the_weights_back_to_the_bit() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loads = []

    def adapter_of(value: float) -> Adapter:
        loads.append(value)
        card = AdapterCard(
            rank=1, groups=("fusion",), adapted_groups=(), base_digest="base", licence="none", consent_id=None
        )
        return Adapter(card=card, tensors={"text_proj.bias": torch.full_like(before["text_proj.bias"], value)})

    slot = AdapterSlot(model)
    for value in (0.3, 0.3, 0.7):
        slot.hold(str(value), lambda value=value: adapter_of(value), "base")
        assert (model.text_proj.bias == value).all()
    assert loads == [0.3, 0.7]
    with pytest.raises(WeightsError, match="belongs to the model"):
        slot.hold("other", lambda: adapter_of(0.9), "another base")
    slot.hold("0.3", lambda: adapter_of(0.3), "base")
    slot.clear()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_adapter_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    card = AdapterCard(
        rank=1, groups=("fusion",), adapted_groups=(), base_digest="base", licence="none", consent_id=None
    )
    with pytest.raises(StorageError, match="cannot be written"):
        Adapter(card=card, tensors={"text_proj.bias": torch.zeros(2)}).save(tmp_path / "gone" / "adapter.safetensors")
