"""One step on many devices, and in less memory: FSDP2 over all processes, and blocks that are computed again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from echovideo.errors import TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.settings import StageSettings


def process() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def prepare(model: EchoVideoTransformer3DModel, settings: StageSettings, *, compiled: bool) -> None:
    """Set up the model's blocks to be recomputed and compiled, and shard its parameters over all processes.

    Every process holds the same weights before; after, a share of each. Gradients are summed in float32.
    Raises TrainingError for more recomputed blocks than there are.
    """
    blocks = model.transformer_blocks
    if settings.recomputed_blocks > len(blocks):
        raise TrainingError(
            f"recomputed_blocks is {settings.recomputed_blocks}, and the model has {len(blocks)}", code="settings"
        )
    model.recomputed_blocks = settings.recomputed_blocks
    if compiled:
        for block in blocks:
            block.compile()
    if process()[1] > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
