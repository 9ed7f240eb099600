"""The tiny model's trained weights, which travel with the package, each part a bfloat16 safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SiglipVisionModel, T5EncoderModel

from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.tiny.folder import WEIGHTS
from echovideo.tiny.parts import fresh_image_encoder, fresh_text_encoder, fresh_vae, tiny_config


def has(part: str) -> bool:
    """Return whether a part is shipped."""
    return _file(WEIGHTS, part).is_file()


def save(part: str, module: nn.Module, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a part's parameters and buffers, each once, in bfloat16."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, _file(folder, part), metadata=metadata)


def save_vae(vae: AutoencoderKLCogVideoX, *, scaling_factor: float, folder: Path) -> None:
    """Write the autoencoder and what its latents are multiplied by, for a deviation of 1."""
    save("autoencoder", vae, folder, {"scaling_factor": repr(round(scaling_factor, 4))})


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer."""
    tokenizer.save_pretrained(folder / "tokenizer")


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Return the shipped tokenizer."""
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")
    return tokenizer


def load_vae() -> AutoencoderKLCogVideoX:
    """Return the shipped autoencoder, float32."""
    vae = fresh_vae()
    _load("autoencoder", vae)
    with safe_open(_file(WEIGHTS, "autoencoder"), "pt") as file:
        vae.register_to_config(scaling_factor=float(file.metadata()["scaling_factor"]))
    return vae


def load_text_encoder() -> T5EncoderModel:
    """Return the shipped text encoder, float32."""
    encoder = fresh_text_encoder()
    _load("text_encoder", encoder)
    return encoder


def load_image_encoder() -> SiglipVisionModel:
    """Return the shipped vision tower, float32."""
    encoder = fresh_image_encoder()
    _load("image_encoder", encoder)
    return encoder


def load_transformer(folder: Path | None = None) -> EchoVideoTransformer3DModel:
    """Return the transformer that `save` wrote to a folder, the shipped one by default, float32."""
    transformer = EchoVideoTransformer3DModel(tiny_config()).eval()
    _load("transformer", transformer, folder)
    return transformer


def _load(part: str, module: nn.Module, folder: Path | None = None) -> None:
    tensors = load_file(_file(folder or WEIGHTS, part))
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    # A tensor that two places share is written once.
    own = module.state_dict()
    assert not unexpected
    assert {own[name].data_ptr() for name in missing} <= {own[name].data_ptr() for name in tensors}


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"
