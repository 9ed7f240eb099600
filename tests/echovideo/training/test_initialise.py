"""Step 0 of a model made from a text-to-video base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echovideo.errors import WeightsError
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.groups import group_of
from echovideo.training.initialise import load_base
from tests.echovideo.training.small import CONFIG, make_batch, small_model


def _base_weights() -> dict[str, torch.Tensor]:
    """A CogVideoX text-to-video transformer's weights: 16 channels in, no fusion."""
    torch.manual_seed(3)
    narrow = EchoVideoTransformer3DModel(replace(CONFIG, in_channels=16))
    return {name: value for name, value in narrow.state_dict().items() if group_of(name) != "fusion"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_base_step_zero_differs_from_the_base_by_nothing(dtype: torch.dtype) -> None:
    weights = _base_weights()
    narrow = EchoVideoTransformer3DModel(replace(CONFIG, in_channels=16))
    narrow.load_state_dict(weights, strict=False)
    narrow.to(dtype)
    model = small_model(seed=9)
    torch.nn.init.normal_(model.text_proj.weight)
    load_base(model, weights)
    model.to(dtype)
    batch = make_batch(torch.arange(3))
    latents, text = batch.latents_BFCHW.to(dtype), batch.text_BND.to(dtype)
    face = torch.randn_like(latents)
    rotary, timestep = rotary_tables(2, 2, 3, 32), torch.tensor([999, 500, 0])
    # In the memory layout that fusion leaves, as a product of another layout may sum in another order.
    expected = narrow.denoise(latents, text.mT.contiguous().mT, timestep, rotary)
    (found,) = model(
        torch.cat([latents, face], dim=2),
        text,
        batch.face_tokens_BND.to(dtype),
        batch.embedding_BD.to(dtype),
        timestep,
        rotary,
        return_dict=False,
    )
    assert float((found - expected).abs().max()) == 0
    assert float(expected.abs().max()) > 0.1


def test_load_base_with_a_missing_an_unknown_or_a_misshapen_tensor_names_it() -> None:
    model, weights = small_model(), _base_weights()
    name = "transformer_blocks.1.attn1.to_q.weight"
    with pytest.raises(WeightsError, match=f"lacks '{name}'"):
        load_base(model, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(WeightsError, match="unknown tensor 'pos_embedding'"):
        load_base(model, weights | {"pos_embedding": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"'transformer_blocks.1.attn1.to_q.weight' has shape \(2, 2\)"):
        load_base(model, weights | {name: torch.zeros(2, 2)})


def test_group_of_every_parameter_is_known() -> None:
    groups = [group_of(name) for name, _ in small_model().named_parameters()]
    assert {group: groups.count(group) for group in dict.fromkeys(groups)} == {
        "fusion": 24,
        "patch_embed": 4,
        "norms": 20,
        "attention": 24,
        "feed_forward": 8,
        "output": 8,
    }
