"""One step on many devices, and in less memory: FSDP2 over all processes, and blocks that compute parts again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from echovideo.errors import TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.adapters import add_adapter
from echovideo.training.settings import StageSettings


def process() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def prepare(model: EchoVideoTransformer3DModel, settings: StageSettings) -> None:
    """Set up the model's blocks to be recomputed, and shard its parameters over all processes.

    Every process holds the same weights before; after, a share of each. Gradients are summed in float32.
    Raises TrainingError for more recomputed blocks than there are.
    """
    blocks = model.transformer_blocks
    if settings.recomputed_blocks > len(blocks):
        raise TrainingError(
            f"recomputed_blocks is {settings.recomputed_blocks}, and the model has {len(blocks)}", code="settings"
        )
    model.recomputed_blocks, model.recompute = settings.recomputed_blocks, settings.recompute
    if process()[1] > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)


def gathered(model: EchoVideoTransformer3DModel, settings: StageSettings) -> EchoVideoTransformer3DModel | None:
    """Return a model with whole weights to render with or to save: on one process the model itself.

    Of a sharded one the first process gets a copy and the others None. Every process calls this.
    """
    rank, world_size = process()
    if world_size == 1:
        return model
    whole = None
    if rank == 0:
        with torch.device("meta"):
            whole = EchoVideoTransformer3DModel(model.config)
        if settings.adapter:
            add_adapter(whole, settings.adapter, settings.seed)
    for name, tensor in model.state_dict().items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if whole is not None:
            parent, _, own_name = name.rpartition(".")
            setattr(whole.get_submodule(parent), own_name, nn.Parameter(value, requires_grad=False))
    return whole
