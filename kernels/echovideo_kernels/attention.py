"""Joint text-video attention: full, unmasked softmax attention over (batch, tokens, heads, head_dim) tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Return softmax(scale * q k^T) v as o_BNHD, in q's dtype; `scale` defaults to head_dim ** -0.5.

    All of q, k and v share batch, heads, head_dim and dtype, and are any strided view of (B, N, H, D).
    PyTorch's scaled_dot_product_attention picks the backend for the device.
    """
    o_BHND = F.scaled_dot_product_attention(
        q_BNHD.transpose(1, 2), k_BNHD.transpose(1, 2), v_BNHD.transpose(1, 2), scale=scale
    )
    return o_BHND.transpose(1, 2)
