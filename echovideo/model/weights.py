"""Reading and writing weights: sharded safetensors, every tensor accounted for, nothing copied twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from echovideo.errors import WeightsError
from echovideo.model.config import read_json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_BYTES = 5 * 1024**3
_ALIGNMENT = 64


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype,
    subset: bool = False,
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Fill `module` (built on the meta device, or not) from the folder's safetensors, in `dtype`, tensor by tensor.

    Every tensor of the module must be in the files with its shape, and every tensor in the files must have a place;
    with `subset` the files may hold more. `rename` maps a file's tensor name to the module's, or to None to leave
    it. A parameter with two names (tied weights) may be stored under either. Raises WeightsError naming the file
    and tensor.
    """
    places = _places(module)
    filled: set[int] = set()
    for path, names in _shards(folder).items():
        with _opened(path) as file:
            present = set(file.keys())
            for name in sorted(names or present):
                if name not in present:
                    raise WeightsError(f"{path} lacks the tensor {name!r} that its index names")
                own_name = rename(name)
                if own_name is None or (subset and own_name not in places):
                    continue
                if own_name not in places:
                    raise WeightsError(f"{path} holds the tensor {name!r}, which {type(module).__name__} does not have")
                expected, aliases = places[own_name]
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(expected.shape):
                    raise WeightsError(f"{path}: {name!r} has shape {shape}, expected {tuple(expected.shape)}")
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                if dtype == torch.float32 and tensor.data_ptr() % _ALIGNMENT:
                    # A CPU's products round otherwise where operands lie otherwise, which the file's header decides.
                    tensor = tensor.clone()
                _assign(module, aliases, tensor)
                filled.add(id(expected))
    missing = sorted({aliases[0] for expected, aliases in places.values() if id(expected) not in filled})
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} tensors of {type(module).__name__}, among them {missing[0]!r}"
        )
    module.requires_grad_(False)


def save_weights(module: nn.Module, folder: Path, config: Mapping[str, Any], stem: str) -> None:
    """Write config.json and the module's tensors as `stem` safetensors, in shards of at most 5 GiB with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = _SHARD_BYTES
    for tensor, names in {id(tensor): (tensor, names) for tensor, names in _places(module).values()}.values():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][names[0]] = tensor.detach().contiguous()
        room -= size
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for shard in shards for t in shard.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})


def _places(module: nn.Module) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Map each stored name of the module to its tensor and to all names of that tensor."""
    names_of: dict[int, list[str]] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    return {name: (tensor, names_of[id(tensor)]) for name, tensor in state.items()}


def _assign(module: nn.Module, names: list[str], tensor: torch.Tensor) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        parent_name, _, own_name = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, own_name, parameter if own_name in parent._parameters else tensor)


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Map each safetensors file of the folder to the names its index gives it (none without an index)."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        shards: dict[Path, list[str]] = {}
        for name, file in read_json(indexes[0]).get("weight_map", {}).items():
            shards.setdefault(folder / file, []).append(name)
        for path in shards:
            if not path.is_file():
                raise WeightsError(f"{path} is missing, though {indexes[0].name} names it")
        return shards
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: []}
    if files:
        raise WeightsError(f"{folder} holds {len(files)} safetensors files and no index; keep one, or add the index")
    pickles = sorted(path for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise WeightsError(f"{pickles[0]} is a pickle, which can run code; convert it to safetensors")
    raise WeightsError(f"{folder} holds no safetensors file")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or not safetensors ({error}); fetch it again") from None
    with file:
        yield file
