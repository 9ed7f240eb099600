"""Parts computed again give the same gradients to the bit, and what is to be kept is computed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from echovideo.model.config import Recompute, TransformerConfig
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.adapters import add_adapter
from echovideo.training.settings import AdapterSettings
from tests.echovideo.training.small import CONFIG
from tests.kernels.comparing import relative_error

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
WIDE = replace(CONFIG, num_attention_heads=8, attention_head_dim=32, time_embed_dim=256, num_layers=2)


class _Calls(TorchDispatchMode):
    """Counts the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _gradients(
    recompute: Recompute | None, adapter: AdapterSettings | None = None, config: TransformerConfig = WIDE, side: int = 8
) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Return the gradients of a forward pass, and how often each operator ran in both passes."""
    torch.manual_seed(0)
    model = EchoVideoTransformer3DModel(config)
    if adapter:
        add_adapter(model, adapter, 0)
    if recompute:
        model.recomputed_blocks, model.recompute = 2, recompute
    latents, text = torch.randn(1, 3, 32, side, side), torch.randn(1, 6, config.text_embed_dim, requires_grad=True)
    tables = rotary_tables(3, side // 2, side // 2, config.attention_head_dim, latents.device)
    with _Calls() as calls:
        model.denoise(latents, text, torch.tensor([500]), tables).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls.counts


@pytest.mark.parametrize("adapter", [None, AdapterSettings(rank=4, groups=("attention", "feed_forward"))])
@pytest.mark.parametrize("recompute", ["elementwise", "products"])
def test_recomputed_blocks_give_the_same_gradients_to_the_bit(
    recompute: Recompute, adapter: AdapterSettings | None
) -> None:
    (expected, _), (found, _) = _gradients(None, adapter), _gradients(recompute, adapter)
    assert expected.keys() == found.keys()
    assert len(found) > 40
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recomputed_blocks_run_again_what_was_asked_for_and_never_attention() -> None:
    (_, kept), (_, elementwise), (_, products) = (_gradients(which) for which in (None, "elementwise", "products"))
    for counts, gelus in ((kept, 2), (elementwise, 4), (products, 4)):
        assert (counts[ATTENTION], counts["aten::gelu"]) == (2, gelus)
    linear = "aten::addmm"
    assert elementwise[linear] == kept[linear]
    # Two modulations, q, k, v, attention's output and the first of the feed-forward; nothing needs the second's result.
    assert products[linear] == kept[linear] + 2 * 7


def test_products_over_few_features_are_run_again() -> None:
    adapter = AdapterSettings(rank=4, groups=("attention",))
    (_, kept), (_, elementwise) = _gradients(None, adapter), _gradients("elementwise", adapter)
    # The adapter's second product in each of four layers of two blocks.
    assert elementwise["aten::mm"] == kept["aten::mm"] + 2 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["elementwise", "products"])
def test_recomputed_blocks_on_gpu_keep_what_the_attention_kernel_gave(recompute: Recompute) -> None:
    config = replace(WIDE, num_attention_heads=4, attention_head_dim=64)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            (expected, _), (found, counts) = (_gradients(which, None, config, 80) for which in (None, recompute))
        finally:
            torch.set_default_dtype(torch.float32)
    assert counts["echovideo::attention"] == 2
    for name, gradient in expected.items():
        # cuDNN's backward adds up in an order of its own.
        assert relative_error(found[name], gradient) < 2e-2, name
