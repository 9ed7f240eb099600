"""The shapes of the model's attention, its inputs, the exact answer, and others' attention called the way ours is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.common import reason
from echovideo.model.config import TransformerConfig
from echovideo.request import MAX_FRAMES, SIZES
from echovideo_kernels import folded_query_scale

CONFIG = TransformerConfig()
NUM_HEADS, HEAD_DIM, NUM_TEXT = CONFIG.num_attention_heads, CONFIG.attention_head_dim, CONFIG.max_text_seq_length
LATENT_FRAMES = (MAX_FRAMES - 1) // 4 + 1
MAIN_SIZE = SIZES["wide"]

FLASH_ATTENTION_4 = "FlashAttention-4"
CUDNN = "cuDNN"
FLASH_ATTENTION_2 = "FlashAttention-2"
FLEX_ATTENTION = "FlexAttention"
SAGE_ATTENTION = "SageAttention 1 (8-bit)"

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Takes q, k and v as (B, N, H, D) and the softmax scale; returns o_BNHD."""


def grid(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches of a frame of this many pixels."""
    return height // 16, width // 16


def num_tokens(height: int, width: int) -> int:
    """Return how many tokens, text and video, the longest video of this size has."""
    rows, columns = grid(height, width)
    return NUM_TEXT + LATENT_FRAMES * rows * columns


def published_lengths() -> dict[int, str]:
    """Return the published sizes (WIDTHxHEIGHT) by their token counts: those of one count are one measurement."""
    lengths: dict[int, list[str]] = {}
    for height, width in SIZES.values():
        lengths.setdefault(num_tokens(height, width), []).append(f"{width}x{height}")
    return {length: ", ".join(names) for length, names in sorted(lengths.items(), reverse=True)}


def inputs(
    batch: int, length: int, gain_H: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v as the model makes them, (B, N, H, D) bfloat16.

    q and k are layer-normed, with a gain for each head; q carries `folded_query_scale` from before its one rounding.
    """
    q, k, v = (torch.randn(batch, length, NUM_HEADS, HEAD_DIM, device="cuda") for _ in range(3))
    gain = torch.as_tensor(gain_H, device="cuda").reshape(-1, 1)
    q, k = (F.layer_norm(x, [HEAD_DIM]) * gain for x in (q, k))
    return (q * folded_query_scale(HEAD_DIM)).bfloat16(), k.bfloat16(), v.bfloat16()


def sampled_rows(length: int) -> torch.Tensor:
    """Return the first and the last 300 rows: text, video, and the tail of the last tile."""
    return torch.cat([torch.arange(300), torch.arange(length - 300, length)]).cuda()


SAMPLED_HEADS = ((0, 0), (-1, -1))
"""Batch and head of the heads on which errors are measured."""


def sample(o_BNHD: torch.Tensor) -> torch.Tensor:
    """Return the rows and heads of an output that `exact_sample` computes."""
    rows = sampled_rows(o_BNHD.shape[1])
    return torch.stack([o_BNHD[b, rows, h] for b, h in SAMPLED_HEADS])


def exact_sample(q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the sampled rows and heads of softmax(scale q k^T) v in float64, from inputs of any dtype."""
    rows = sampled_rows(q_BNHD.shape[1])
    return torch.stack(
        [
            torch.softmax(scale * q_BNHD[b, rows, h].double() @ k_BNHD[b, :, h].double().T, dim=-1)
            @ v_BNHD[b, :, h].double()
            for b, h in SAMPLED_HEADS
        ]
    )


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return o.transpose(1, 2)

    return attention


def _flex() -> Attention:
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        o: torch.Tensor = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return o.transpose(1, 2)

    return attention


def _flash_attention_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        o: torch.Tensor = flash_attn_func(q, k, v, softmax_scale=scale)[0]
        return o

    return attention


def _sage() -> Attention:
    from sageattention import sageattn

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        # Left to itself it takes the mean from the caller's k, which would change the others' inputs.
        smooth = k - k.mean(dim=1, keepdim=True)
        o: torch.Tensor = sageattn(q, smooth, v, tensor_layout="NHD", sm_scale=scale, smooth_k=False)
        return o

    return attention


@cache
def peers() -> dict[str, Attention | str]:
    """Return others' attention by name; a text says why one is missing."""
    made: dict[str, Attention | str] = {
        CUDNN: _sdpa(SDPBackend.CUDNN_ATTENTION),
        FLASH_ATTENTION_2: _sdpa(SDPBackend.FLASH_ATTENTION),
        FLEX_ATTENTION: _flex(),
    }
    for name, make in ((FLASH_ATTENTION_4, _flash_attention_4), (SAGE_ATTENTION, _sage)):
        try:
            made[name] = make()
        except ImportError as error:
            made[name] = reason(error)
    return {name: made[name] for name in (FLASH_ATTENTION_4, CUDNN, FLASH_ATTENTION_2, FLEX_ATTENTION, SAGE_ATTENTION)}
