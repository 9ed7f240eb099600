"""Low-rank adapters (LoRA, arXiv 2106.09685): layers to train, one file to keep them, and merging to render.

An adapter file also carries the parameters of the groups that were trained in full beside it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from echovideo.errors import StorageError, WeightsError
from echovideo.hashing import normal
from echovideo.model.fusion import IdentityImageTextFusion
from echovideo.training.groups import group_of
from echovideo.training.settings import AdapterSettings, Group, StageSettings

SCHEMA = 1
_DOWN, _UP = ".lora_down", ".lora_up"
_ADAPTED: Mapping[Group, tuple[str, ...]] = {
    "attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "feed_forward": ("ff.net.2",),
}


class LoraLinear(nn.Module):
    """A linear layer x W^T + b with x A^T B^T added; A is `lora_down` (rank, in), B `lora_up` (out, rank)."""

    def __init__(self, linear: nn.Linear, down_RI: torch.Tensor, up_OR: torch.Tensor) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_down = nn.Parameter(down_RI)
        self.lora_up = nn.Parameter(up_OR)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_adapter(model: nn.Module, settings: AdapterSettings, seed: int) -> None:
    """Put trainable low-rank layers beside the groups' linear layers; the model's output stays as it is, B being 0.

    A is normal with variance 1 / in, from the seed and the layer's name. The model's own parameters keep their names.
    """
    layers = {layer for group in settings.groups for layer in _ADAPTED[group]}
    for name, linear in list(model.named_modules()):
        assert not isinstance(linear, LoraLinear), "the model has an adapter already"
        if not isinstance(linear, nn.Linear) or name.split(".", 2)[-1] not in layers:
            continue
        width_out, width_in = linear.weight.shape
        own_seed = torch.tensor([zlib.crc32(f"{seed} {name}".encode())])
        down = normal(own_seed, settings.rank * width_in, 0).view(settings.rank, width_in) / width_in**0.5
        up = torch.zeros(width_out, settings.rank)
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, LoraLinear(linear, down.to(linear.weight), up.to(linear.weight)))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCard:
    """What must be known of an adapter: its shape, the model it belongs to, its terms, and who agreed.

    `groups` were trained in full, `adapted_groups` by layers of `rank`. `base_digest` is the base's folder digest;
    `licence` binds what is made with the adapter: the base's, as it is made from it. `consent_id` names the person's
    consent, and is None for people who do not exist.
    """

    rank: int
    groups: tuple[Group, ...]
    adapted_groups: tuple[Group, ...]
    base_digest: str
    licence: str
    consent_id: str | None

    def to_metadata(self) -> dict[str, str]:
        """Return the card as a safetensors file's metadata."""
        return {"schema": str(SCHEMA), "card": json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> AdapterCard:
        """Return the card that `to_metadata` gave; raises ValueError, KeyError or TypeError for anything else."""
        if metadata.get("schema") != str(SCHEMA):
            raise ValueError(f"schema {metadata.get('schema')}, expected {SCHEMA}")
        values: dict[str, Any] = json.loads(metadata["card"])
        return cls(**values | {name: tuple(values[name]) for name in ("groups", "adapted_groups")})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """A card and its tensors: `<layer>.lora_down`, `<layer>.lora_up`, and whole parameters under their own names."""

    card: AdapterCard
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        settings: StageSettings,
        *,
        base_digest: str,
        licence: str,
        consent_id: str | None,
    ) -> Adapter:
        """Take the trained parameters out of a model that `settings` trained, with whole weights."""
        assert settings.adapter is not None
        card = AdapterCard(
            rank=settings.adapter.rank,
            groups=settings.groups,
            adapted_groups=settings.adapter.groups,
            base_digest=base_digest,
            licence=licence,
            consent_id=consent_id,
        )
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if name.endswith((_DOWN, _UP)) or group_of(name) in settings.groups
        }
        return cls(card=card, tensors=tensors)

    def save(self, path: Path) -> None:
        """Write the adapter as one safetensors file, which is there whole or not at all; raises StorageError."""
        writing = path.with_name(f".{path.name}.writing")
        try:
            save_file(dict(self.tensors), writing, metadata=self.card.to_metadata())
            writing.rename(path)
        except (OSError, SafetensorError) as error:
            writing.unlink(missing_ok=True)
            raise StorageError(f"{path} cannot be written ({error}); make room or correct the folder") from error

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read an adapter file; raises WeightsError if it is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                card = AdapterCard.from_metadata(file.metadata() or {})
                return cls(card=card, tensors={name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} is missing, truncated or not safetensors ({error})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is no adapter file ({error})") from None


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter, base_digest: str) -> dict[str, torch.Tensor]:
    """Put an adapter into a model's weights and return, on the CPU, those it replaced: `unmerge` brings them back.

    A module that is fusion alone takes its part of the adapter. Sums are made in float32 and rounded once. Raises
    WeightsError, with the model unchanged, if the adapter is another base's or does not fit.
    """
    if adapter.card.base_digest != base_digest:
        raise WeightsError(
            f"the adapter belongs to the model {adapter.card.base_digest[:16]}, and this one is {base_digest[:16]}"
        )
    parameters = dict(model.named_parameters())
    whole = type(model) is not IdentityImageTextFusion
    changes: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if name.endswith(_UP) or (not whole and group_of(name) != "fusion"):
            continue
        target = f"{name.removesuffix(_DOWN)}.weight" if name.endswith(_DOWN) else name
        weight = parameters.get(target)
        if weight is None:
            raise WeightsError(f"the adapter changes {target!r}, which {type(model).__name__} does not have")
        if name.endswith(_DOWN):
            up = adapter.tensors.get(name.removesuffix(_DOWN) + _UP)
            if up is None:
                raise WeightsError(f"the adapter lacks {name.removesuffix(_DOWN) + _UP!r}")
            tensor = weight.float() + up.to(weight.device).float() @ tensor.to(weight.device).float()
        if tensor.shape != weight.shape:
            raise WeightsError(f"the adapter's {target!r} has shape {tuple(tensor.shape)}, not {tuple(weight.shape)}")
        changes[target] = tensor.to(weight.dtype)
    replaced = {name: parameters[name].detach().cpu().clone() for name in changes}
    _put(parameters, changes)
    return replaced


@torch.no_grad()
def unmerge(model: nn.Module, replaced: Mapping[str, torch.Tensor]) -> None:
    """Give the model back the weights that `merge` replaced, to the bit."""
    _put(dict(model.named_parameters()), replaced)


class AdapterSlot:
    """A model with at most one adapter merged into it, which stays until another one is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._digest: str | None = None
        self._replaced: Mapping[str, torch.Tensor] = {}

    def hold(self, digest: str, load: Callable[[], Adapter], base_digest: str) -> None:
        """Have the adapter of that digest in the model; `load` is called if it is not there yet.

        Raises what `load` and `merge` raise; then the model holds none.
        """
        if digest == self._digest:
            return
        self.clear()
        self._replaced = merge(self._model, load(), base_digest)
        self._digest = digest

    def clear(self) -> None:
        """Give the model its own weights back, to the bit."""
        unmerge(self._model, self._replaced)
        self._digest, self._replaced = None, {}


def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
