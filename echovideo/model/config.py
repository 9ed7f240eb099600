"""The transformer's configuration, with the published model's values as defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from echovideo.errors import WeightsError
from echovideo.request import SIZES

Recompute = Literal["elementwise", "products"]
"""What training computes again in the backward pass: norms, rotary embedding and GELU, or linear layers too."""

_FIXED: Mapping[str, Any] = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "norm_elementwise_affine": True,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
    "patch_size_t": None,
    "ofs_embed_dim": None,
    "temporal_compression_ratio": 4,
}
_CELL = 8
"""Pixels of a latent cell's side."""
_UNUSED = {"spatial_interpolation_scale", "temporal_interpolation_scale"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Sizes of an EchoVideoTransformer3DModel; keys as in the published `transformer/config.json`.

    The `resampler_*` sizes are constants of the published class and config here. `sample_*` are the training
    size in latent cells and frames: no computation of the model reads them, `sizes` does.
    """

    num_attention_heads: int = 48
    attention_head_dim: int = 64
    in_channels: int = 32
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    face_embed_dim: int = 768
    face_features_embed_dim: int = 512
    num_layers: int = 42
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    max_text_seq_length: int = 226
    face_seq_length: int = 196
    face_features_seq_length: int = 144
    norm_eps: float = 1e-5
    resampler_dim: int = 1024
    resampler_depth: int = 4
    resampler_num_heads: int = 12
    resampler_head_dim: int = 64
    resampler_num_queries: int = 16

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """(height, width) in pixels of what the model was trained on, by name: the published sizes, or one smaller."""
        height, width = self.sample_height * _CELL, self.sample_width * _CELL
        if min(height, width) >= min(min(size) for size in SIZES.values()):
            return SIZES
        return {f"{width}x{height}": (height, width)}

    @property
    def default_size(self) -> str:
        """The name, of `sizes`, of what is rendered where nobody asks for a size."""
        return next(iter(self.sizes))

    @property
    def inner_dim(self) -> int:
        """Width of the transformer's hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a `config.json` dict; keys with a leading underscore and absent ones are ignored.

        Raises WeightsError for an unknown key, or for a value this architecture does not have.
        """
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name in names:
                known[name] = value
            elif name in _FIXED:
                if value != _FIXED[name]:
                    raise WeightsError(f"transformer config has {name} = {value!r}; only {_FIXED[name]!r} is supported")
            elif not name.startswith("_") and name not in _UNUSED:
                raise WeightsError(f"transformer config has the unknown key {name!r}")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return the published `config.json` keys and values."""
        return {"_class_name": "EchoVideoTransformer3DModel", **asdict(self), **_FIXED}


def read_config(folder: Path) -> dict[str, Any]:
    """Return `folder/config.json`; raises WeightsError as `read_json`."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a model folder; raises WeightsError when it is missing or no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: is {path.parent.parent} a whole model folder?") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object; fetch it again")
    return values
