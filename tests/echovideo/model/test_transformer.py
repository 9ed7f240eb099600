import json

import pytest
import torch

from echovideo import EchoVideoTransformer3DModel, IdentityImageTextFusion
from echovideo.errors import WeightsError
from echovideo.model.config import TransformerConfig
from echovideo.model.rotary import rotary_tables
from tests.echovideo.parity import FOLDER, formula, make_transformer, recorded, relative_error

RECORDS = ["transformer_64x96", "transformer_portrait"]


def test_transformer_published_config_has_published_names_and_shapes() -> None:
    published = json.loads((FOLDER / "echovideo_5b_state_dict.json").read_text())
    with torch.device("meta"):
        model = EchoVideoTransformer3DModel.from_config(json.loads((FOLDER / "echovideo_5b_config.json").read_text()))
        default = EchoVideoTransformer3DModel.from_config({})
    assert len(published) == 1081
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert {name: list(tensor.shape) for name, tensor in default.state_dict().items()} == published


@pytest.mark.parametrize("record", RECORDS)
def test_transformer_recorded_inputs_give_recorded_fusion_and_velocity(record: str) -> None:
    arrays, facts = recorded(record)
    batch, frames, height, width = facts["shape"]
    salt, text_dim = facts["salt"], facts["config"]["text_embed_dim"]
    model = make_transformer(facts["config"], salt)
    prompt = formula("encoder_hidden_states", (batch, 226, text_dim), salt)
    face = formula("encoder_face_hidden_states", (batch, 196, 768), salt)
    embedding = formula("face_embedding", (batch, 512), salt)

    fused = model.fuse(prompt, face, embedding)
    (sample,) = model(
        hidden_states=formula("hidden_states", (batch, frames, 32, height, width), salt),
        encoder_hidden_states=prompt,
        encoder_face_hidden_states=face,
        encoder_face_feats_hidden_states=embedding[:, None].repeat(1, 144, 1),
        timestep=arrays["timestep"],
        image_rotary_emb=(arrays["rope_cos"], arrays["rope_sin"]),
        return_dict=False,
    )

    assert fused.shape == arrays["iitf"].shape
    assert relative_error(fused, arrays["iitf"]) < 1e-5
    assert sample.shape == arrays["sample"].shape
    assert relative_error(sample, arrays["sample"]) < 1e-5


@pytest.mark.parametrize("record", RECORDS)
def test_rotary_tables_recorded_grids_give_recorded_tables(record: str) -> None:
    arrays, facts = recorded(record)
    _, frames, height, width = facts["shape"]
    cos, sin = rotary_tables(frames, height // 2, width // 2)
    assert relative_error(cos, arrays["rope_cos"]) < 1e-6
    assert relative_error(sin, arrays["rope_sin"]) < 1e-6


def test_transformer_without_gradients_gives_the_same_bits_and_leaves_its_inputs() -> None:
    arrays, facts = recorded("transformer_64x96")
    batch, frames, height, width = facts["shape"]
    model = make_transformer(facts["config"], facts["salt"])
    latents = formula("hidden_states", (batch, frames, 32, height, width), facts["salt"])
    condition = formula("condition", (batch, 226, facts["config"]["text_embed_dim"]), facts["salt"])
    inputs = (latents, condition, arrays["timestep"], (arrays["rope_cos"], arrays["rope_sin"]))
    kept = [tensor.clone() for tensor in (latents, condition, *inputs[3])]
    functional = model.denoise(*inputs)
    with torch.no_grad():
        in_place = model.denoise(*inputs)
    assert torch.equal(in_place, functional)
    assert all(torch.equal(a, b) for a, b in zip((latents, condition, *inputs[3]), kept, strict=True))


def test_transformer_gradient_is_the_slope_of_its_loss() -> None:
    arrays, facts = recorded("transformer_64x96")
    batch, frames, height, width = facts["shape"]
    model = make_transformer(facts["config"], facts["salt"]).double().requires_grad_(True)
    latents = formula("hidden_states", (batch, frames, 32, height, width), facts["salt"]).double()
    condition = formula("condition", (batch, 226, facts["config"]["text_embed_dim"]), facts["salt"]).double()
    rotary = (arrays["rope_cos"].double(), arrays["rope_sin"].double())
    fusion = dict(IdentityImageTextFusion(model.config).named_parameters())
    backbone = {name: p for name, p in model.named_parameters() if name not in fusion}

    def loss() -> torch.Tensor:
        return model.denoise(latents, condition, arrays["timestep"], rotary).square().sum()

    gradients = torch.autograd.grad(loss(), list(backbone.values()))
    directions = [formula(name, tuple(p.shape), 1).double() for name, p in backbone.items()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    with torch.no_grad():
        for p, d in zip(backbone.values(), directions, strict=True):
            p.add_(d, alpha=step)
        above = float(loss())
        for p, d in zip(backbone.values(), directions, strict=True):
            p.sub_(d, alpha=2 * step)
        below = float(loss())
    assert abs((above - below) / (2 * step) - slope) < 1e-5 * abs(slope)


def test_transformer_rotary_tables_of_another_grid_are_refused() -> None:
    arrays, facts = recorded("transformer_64x96")
    batch, frames, height, width = facts["shape"]
    model = make_transformer(facts["config"], facts["salt"])
    latents = torch.zeros(batch, frames, 32, height, width)
    condition = torch.zeros(batch, 226, facts["config"]["text_embed_dim"])
    num_video = len(arrays["rope_cos"])
    with pytest.raises(ValueError, match=f"tables of {num_video - 1} tokens for a video of {num_video}"):
        model.denoise(latents, condition, arrays["timestep"], (arrays["rope_cos"][1:], arrays["rope_sin"][1:]))


def test_fusion_by_itself_gives_the_transformers_condition() -> None:
    _, facts = recorded("transformer_64x96")
    model = make_transformer(facts["config"], facts["salt"])
    fusion = IdentityImageTextFusion(model.config)
    fusion.load_state_dict({name: model.state_dict()[name] for name in fusion.state_dict()})
    inputs = (torch.randn(1, 226, 48), torch.randn(1, 196, 768), torch.randn(1, 512))
    assert torch.equal(fusion(*inputs), model.fuse(*inputs))
    assert len(fusion.state_dict()) == 57


def test_config_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(WeightsError, match="num_haeds"):
        TransformerConfig.from_dict({"num_haeds": 3})


def test_config_unsupported_value_is_refused_by_name() -> None:
    with pytest.raises(WeightsError, match="use_rotary_positional_embeddings"):
        TransformerConfig.from_dict({"use_rotary_positional_embeddings": False})
