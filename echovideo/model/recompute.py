"""What a transformer block computes again in the backward pass, so that it need not be kept until then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from echovideo.model.config import Recompute

_ATTENTION = {
    "echovideo::attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
_PRODUCTS = {"aten::addmm", "aten::mm"}
_LEAST_WIDTH = 256
"""A product over fewer features than this, as an adapter's second one is, costs less than the memory of its result."""


def recomputed(block: Callable[..., Any], recompute: Recompute, *inputs: Any) -> Any:
    """Return the block's outputs for the inputs; attention's output is kept, and products' if they are not recomputed.

    Gradients are the same to the bit. A block draws no random numbers, so no generator's state is brought back.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, recompute))
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(recompute: Recompute, _: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    keeps = operator.name() in _ATTENTION
    if recompute == "elementwise" and operator.name() in _PRODUCTS:
        keeps = args[-1].shape[0] >= _LEAST_WIDTH
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
