from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.tiny import shipped
from echovideo.tiny.parts import fresh_image_encoder, fresh_text_encoder, fresh_vae, tiny_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights in the place of the package's."""
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    return tmp_path


def test_shipped_parts_loaded_are_those_saved_in_bfloat16(folder: Path) -> None:
    torch.manual_seed(0)
    parts = {
        "text_encoder": (fresh_text_encoder(), shipped.load_text_encoder),
        "image_encoder": (fresh_image_encoder(), shipped.load_image_encoder),
        "transformer": (EchoVideoTransformer3DModel(tiny_config()), shipped.load_transformer),
    }
    for name, (module, load) in parts.items():
        assert not shipped.has(name)
        shipped.save(name, module, folder)
        assert shipped.has(name)
        loaded = load().state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(loaded[key], tensor.bfloat16().to(tensor.dtype)), (name, key)


def test_shipped_autoencoder_keeps_its_scaling_factor(folder: Path) -> None:
    vae = fresh_vae()
    shipped.save_vae(vae, scaling_factor=1.23456, folder=folder)
    loaded = shipped.load_vae()
    assert loaded.config.scaling_factor == 1.2346
    assert torch.equal(loaded.decoder.conv_out.conv.weight, vae.decoder.conv_out.conv.weight.bfloat16().float())


def test_shipped_transformer_has_the_published_names_and_no_more_than_16_mib(tmp_path: Path) -> None:
    transformer = EchoVideoTransformer3DModel(tiny_config())
    shipped.save("transformer", transformer, tmp_path)
    file = tmp_path / "transformer.safetensors"
    tensors = load_file(file)
    assert set(tensors) == set(transformer.state_dict())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert file.stat().st_size < 16 * 2**20
    assert torch.equal(
        shipped.load_transformer(tmp_path).proj_out.weight, transformer.proj_out.weight.bfloat16().float()
    )
