"""The plan of the attention kernel, run by Triton's interpreter: which heads' tiles go to which pass."""

import importlib

import pytest
import torch

from tests.kernels.comparing import random

module = importlib.import_module("echovideo_kernels.attention")


def planned(q: torch.Tensor, k: torch.Tensor, log2_scale: float) -> tuple[set[int], set[int]]:
    """The tiles that the plan puts on the lists of the first and of the second pass; 3 tiles a head."""
    batch, num_tokens, num_heads, head_dim = q.shape
    num_tiles = batch * num_heads * 3
    counts = torch.zeros(2, dtype=torch.int32)
    lists = torch.full((2 * num_tiles,), -1, dtype=torch.int32)
    module._plan_kernel[(batch * num_heads,)](
        q,
        k,
        counts,
        lists,
        num_tokens,
        num_heads,
        3,
        num_tiles,
        log2_scale,
        *q.stride()[:3],
        *k.stride()[:3],
        HEAD_DIM=head_dim,
        ROWS=64,
        KEYS=128,
        LIMIT=110.0,
    )
    first, second = (lists[start : start + count].tolist() for start, count in zip((0, num_tiles), counts, strict=True))
    assert len(first) + len(second) == num_tiles
    return set(first), set(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plan_kernel_head_with_large_logits_goes_to_the_second_pass_alone(dtype: torch.dtype) -> None:
    q, k, _ = random(2, 600, 3, 3, 16, dtype=dtype).unbind(2)
    q[1, :, 2] *= 30
    assert float((q[1, :, 2].float() @ k[1, :, 2].float().T).max()) > 110
    assert planned(q, k, 1.0) == (set(range(15)), {15, 16, 17})


def test_plan_kernel_scale_counts_as_logits_do() -> None:
    q, k, _ = random(1, 600, 3, 1, 16).unbind(2)
    assert planned(q, k, 1.0) == ({0, 1, 2}, set())
    assert planned(q, k, 30.0) == (set(), {0, 1, 2})
