"""LayerNorm of each head's queries and keys, rotary embedding of the video's, and the softmax scale, in one pass."""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import torch.nn.functional as F

from echovideo_kernels._triton import jit, tl, triton
from echovideo_kernels.dispatch import options, serves

FOLDED_SCALE: float = math.log(2)
"""The `scale` of attention over queries that already carry `folded_query_scale`: softmax of it is 2^(q.k), normed."""


def folded_query_scale(head_dim: int) -> float:
    """Return head_dim^-0.5 log2(e), which makes the softmax of scaled products a power of two.

    It goes into q in float32, before the one rounding: scaling a rounded q would round it twice.
    """
    return 1 / math.sqrt(head_dim) * math.log2(math.e)


def qk_norm_rope(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    *,
    q_scale: float,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q_scale * rotary(LayerNorm(q)) and rotary(LayerNorm(k)), each (B, N, H, D) in its own dtype.

    q and k are any view whose features are adjacent. The LayerNorm runs over D with weights that all heads share.
    The tables are float32, each angle repeated for the two features of its pair, and belong to the last len(cos_ND)
    tokens; those before (the text) are not rotated. Computed in float32 and rounded once. Raises ValueError for
    shapes, dtypes or strides it cannot take.
    """
    tensors = (q_BNHD, k_BNHD, q_weight_D, q_bias_D, k_weight_D, k_bias_D, cos_ND, sin_ND)
    _check(*tensors)
    if serves("qk_norm_rope", q_BNHD, q_BNHD.shape[1]):
        q, k = _qk_norm_rope(*tensors, q_scale, eps)
        return q, k
    return qk_norm_rope_reference(*tensors, q_scale=q_scale, eps=eps)


def qk_norm_rope_(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    *,
    q_scale: float,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `qk_norm_rope` does in the memory of q and k, and return them; for inference, without a derivative."""
    tensors = (q_BNHD, k_BNHD, q_weight_D, q_bias_D, k_weight_D, k_bias_D, cos_ND, sin_ND)
    _check(*tensors)
    if serves("qk_norm_rope", q_BNHD, q_BNHD.shape[1]):
        _qk_norm_rope_(*tensors, q_scale, eps)
    else:
        q, k = qk_norm_rope_reference(*tensors, q_scale=q_scale, eps=eps)
        q_BNHD.copy_(q)
        k_BNHD.copy_(k)
    return q_BNHD, k_BNHD


def qk_norm_rope_reference(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    *,
    q_scale: float,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `qk_norm_rope` does in plain PyTorch: in float64 for float64 inputs, else in float32."""
    q = _norm_rope_reference(q_BNHD, q_weight_D, q_bias_D, cos_ND, sin_ND, q_scale, eps)
    return q, _norm_rope_reference(k_BNHD, k_weight_D, k_bias_D, cos_ND, sin_ND, 1.0, eps)


def _norm_rope_reference(
    x_BNHD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    scale: float,
    eps: float,
) -> torch.Tensor:
    dtype = torch.promote_types(x_BNHD.dtype, torch.float32)
    normed = F.layer_norm(x_BNHD.to(dtype), x_BNHD.shape[-1:], weight_D.to(dtype), bias_D.to(dtype), eps)
    text, video = normed.tensor_split([x_BNHD.shape[1] - len(cos_ND)], dim=1)
    even, odd = video.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_ND[:, None, ::2], sin_ND[:, None, ::2]
    video = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return (torch.cat([text, video], dim=1) * scale).to(x_BNHD.dtype)


def _check(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
) -> None:
    if q_BNHD.ndim != 4 or q_BNHD.shape != k_BNHD.shape or q_BNHD.dtype != k_BNHD.dtype:
        raise ValueError(
            "q and k must be (B, N, H, D) of one shape and dtype, not "
            f"{tuple(q_BNHD.shape)} {q_BNHD.dtype} and {tuple(k_BNHD.shape)} {k_BNHD.dtype}"
        )
    _, num_tokens, _, head_dim = q_BNHD.shape
    if any(vector.shape != (head_dim,) for vector in (q_weight_D, q_bias_D, k_weight_D, k_bias_D)):
        raise ValueError(f"weights and biases must be ({head_dim},), as q's features are")
    if cos_ND.shape != sin_ND.shape or cos_ND.shape[1:] != (head_dim,) or len(cos_ND) > num_tokens:
        raise ValueError(
            f"the rotary tables must be (at most {num_tokens}, {head_dim}), not "
            f"{tuple(cos_ND.shape)} and {tuple(sin_ND.shape)}"
        )
    if cos_ND.dtype != sin_ND.dtype or cos_ND.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the rotary tables must be float32, not {cos_ND.dtype} and {sin_ND.dtype}")


def _check_kernel(*tensors_BNHD: torch.Tensor) -> None:
    head_dim = tensors_BNHD[0].shape[-1]
    if not 8 <= head_dim <= 256 or head_dim & (head_dim - 1):
        raise ValueError(f"the kernel takes head widths of 8, 16, 32, 64, 128 and 256, not {head_dim}")
    for tensor in tensors_BNHD:
        if tensor.stride(-1) != 1:
            raise ValueError(f"the features of q and k must be adjacent in memory, not {tensor.stride(-1)} apart")


@jit
@no_type_check
def _tile(x_ptr, strides, batch, row, H: tl.constexpr, D: tl.constexpr):
    start = batch.to(tl.int64) * strides[0] + (row // H).to(tl.int64) * strides[1] + (row % H) * strides[2]
    return x_ptr + start[:, None] + tl.arange(0, D)[None, :]


@jit
@no_type_check
def _tables(cos_ptr, sin_ptr, token, valid, D: tl.constexpr):
    # `token` counts from the first video token; those of the text, below 0, are turned by no angle.
    at = token.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    rotated = (valid & (token >= 0))[:, None]
    return tl.load(cos_ptr + at, mask=rotated, other=1.0), tl.load(sin_ptr + at, mask=rotated, other=0.0)


@jit
@no_type_check
def _rotate(x, cos, sin, D: tl.constexpr, ROWS: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return x * cos + tl.reshape(tl.join(-odd, even), (ROWS, D)) * sin


@jit
@no_type_check
def _normed(x, eps, D: tl.constexpr):
    centred = x - (tl.sum(x, axis=1) / D)[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
    return centred * rstd, rstd


@jit
@no_type_check
def _vector(ptr, D: tl.constexpr):
    return tl.load(ptr + tl.arange(0, D)[None, :]).to(tl.float32)


@jit
@no_type_check
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_strides,
    k_strides,
    q_out_strides,
    k_out_strides,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    num_text,
    q_scale,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_tokens * H
    mask = valid[:, None]
    q = tl.load(_tile(q_ptr, q_strides, batch, row, H, D), mask=mask, other=0.0).to(tl.float32)
    k = tl.load(_tile(k_ptr, k_strides, batch, row, H, D), mask=mask, other=0.0).to(tl.float32)
    cos, sin = _tables(cos_ptr, sin_ptr, row // H - num_text, valid, D)
    q, _ = _normed(q, eps, D)
    q = _rotate(q * _vector(q_weight_ptr, D) + _vector(q_bias_ptr, D), cos, sin, D, ROWS) * q_scale
    tl.store(_tile(q_out_ptr, q_out_strides, batch, row, H, D), q, mask=mask)
    k, _ = _normed(k, eps, D)
    k = _rotate(k * _vector(k_weight_ptr, D) + _vector(k_bias_ptr, D), cos, sin, D, ROWS)
    tl.store(_tile(k_out_ptr, k_out_strides, batch, row, H, D), k, mask=mask)


@jit
@no_type_check
def _backward_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    sums_ptr,
    grad_strides,
    x_strides,
    dx_strides,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    num_batches,
    num_tokens,
    num_text,
    scale,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    # PROGRAMS programs share all tiles, a fixed number, so that the sums repeat.
    program = tl.program_id(0)
    tiles = tl.cdiv(num_tokens * H, ROWS)
    weight = _vector(weight_ptr, D)
    dweight = tl.zeros((ROWS, D), tl.float32)
    dbias = tl.zeros((ROWS, D), tl.float32)
    for tile in range(program, num_batches * tiles, tl.num_programs(0)):
        batch = tile // tiles
        row = (tile % tiles) * ROWS + tl.arange(0, ROWS)
        valid = row < num_tokens * H
        mask = valid[:, None]
        grad = tl.load(_tile(grad_ptr, grad_strides, batch, row, H, D), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(_tile(x_ptr, x_strides, batch, row, H, D), mask=mask, other=0.0).to(tl.float32)
        cos, sin = _tables(cos_ptr, sin_ptr, row // H - num_text, valid, D)
        x, rstd = _normed(x, eps, D)
        grad = _rotate(grad * scale, cos, -sin, D, ROWS)
        dweight += grad * x
        dbias += grad
        grad = grad * weight
        mean = (tl.sum(grad, axis=1) / D)[:, None]
        dx = rstd * (grad - mean - x * (tl.sum(grad * x, axis=1) / D)[:, None])
        tl.store(_tile(dx_ptr, dx_strides, batch, row, H, D), dx, mask=mask)
    at = sums_ptr + program * 2 * D + tl.arange(0, D)
    tl.store(at, tl.sum(dweight, axis=0))
    tl.store(at + D, tl.sum(dbias, axis=0))


def _launch_forward(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    q_scale: float,
    eps: float,
    q_out_BNHD: torch.Tensor,
    k_out_BNHD: torch.Tensor,
    config: dict[str, int] | None = None,
) -> None:
    _check_kernel(q_BNHD, k_BNHD, q_out_BNHD, k_out_BNHD)
    config = config or options("qk_norm_rope", q_BNHD)
    batch, num_tokens, heads, head_dim = q_BNHD.shape
    _forward_kernel[triton.cdiv(num_tokens * heads, config["ROWS"]), batch](
        q_BNHD,
        k_BNHD,
        q_out_BNHD,
        k_out_BNHD,
        q_BNHD.stride()[:3],
        k_BNHD.stride()[:3],
        q_out_BNHD.stride()[:3],
        k_out_BNHD.stride()[:3],
        q_weight_D.contiguous(),
        q_bias_D.contiguous(),
        k_weight_D.contiguous(),
        k_bias_D.contiguous(),
        cos_ND.contiguous(),
        sin_ND.contiguous(),
        num_tokens,
        num_tokens - len(cos_ND),
        q_scale,
        eps,
        H=heads,
        D=head_dim,
        **config,
    )


def _launch_backward(
    grad_BNHD: torch.Tensor,
    x_BNHD: torch.Tensor,
    weight_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    scale: float,
    eps: float,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx_BNHD and the float32 sums_2D of the derivatives of weight and bias."""
    grad_BNHD = grad_BNHD if grad_BNHD.stride(-1) == 1 else grad_BNHD.contiguous()
    _check_kernel(grad_BNHD, x_BNHD)
    config = config or options("qk_norm_rope_backward", x_BNHD)
    batch, num_tokens, heads, head_dim = x_BNHD.shape
    dx_BNHD = x_BNHD.new_empty(x_BNHD.shape)
    programs = min(config["PROGRAMS"], batch * triton.cdiv(num_tokens * heads, config["ROWS"]))
    sums = x_BNHD.new_empty((programs, 2, head_dim), dtype=torch.float32)
    _backward_kernel[programs,](
        grad_BNHD,
        x_BNHD,
        dx_BNHD,
        sums,
        grad_BNHD.stride()[:3],
        x_BNHD.stride()[:3],
        dx_BNHD.stride()[:3],
        weight_D.contiguous(),
        cos_ND.contiguous(),
        sin_ND.contiguous(),
        batch,
        num_tokens,
        num_tokens - len(cos_ND),
        scale,
        eps,
        H=heads,
        D=head_dim,
        ROWS=config["ROWS"],
        num_warps=config["num_warps"],
    )
    return dx_BNHD, sums.sum(dim=0)


@torch.library.custom_op("echovideo::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    q_scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (q_BNHD, k_BNHD, q_weight_D, q_bias_D, k_weight_D, k_bias_D, cos_ND, sin_ND)
    q_out_BNHD, k_out_BNHD = q_BNHD.new_empty(q_BNHD.shape), k_BNHD.new_empty(k_BNHD.shape)
    _launch_forward(*tensors, q_scale, eps, q_out_BNHD, k_out_BNHD)
    return q_out_BNHD, k_out_BNHD


@_qk_norm_rope.register_fake
def _(q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q_BNHD.new_empty(q_BNHD.shape), k_BNHD.new_empty(k_BNHD.shape)


@torch.library.custom_op("echovideo::qk_norm_rope_", mutates_args=("q_BNHD", "k_BNHD"))
def _qk_norm_rope_(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    q_weight_D: torch.Tensor,
    q_bias_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    k_bias_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    q_scale: float,
    eps: float,
) -> None:
    tensors = (q_BNHD, k_BNHD, q_weight_D, q_bias_D, k_weight_D, k_bias_D, cos_ND, sin_ND)
    _launch_forward(*tensors, q_scale, eps, q_BNHD, k_BNHD)


@torch.library.custom_op("echovideo::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad_BNHD: torch.Tensor,
    x_BNHD: torch.Tensor,
    weight_D: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_backward(grad_BNHD, x_BNHD, weight_D, cos_ND, sin_ND, scale, eps)


@_norm_rope_backward.register_fake
def _(grad_BNHD: torch.Tensor, x_BNHD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BNHD.new_empty(x_BNHD.shape), x_BNHD.new_empty((2, x_BNHD.shape[-1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.q_scale, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq_BNHD: torch.Tensor, dk_BNHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, q_weight, q_bias, k_weight, k_bias, cos, sin = ctx.saved_tensors
    dq, q_sums = _norm_rope_backward(dq_BNHD, q, q_weight, cos, sin, ctx.q_scale, ctx.eps)
    dk, k_sums = _norm_rope_backward(dk_BNHD, k, k_weight, cos, sin, 1.0, ctx.eps)
    dq_weight, dq_bias = q_sums[0].to(q_weight.dtype), q_sums[1].to(q_bias.dtype)
    dk_weight, dk_bias = k_sums[0].to(k_weight.dtype), k_sums[1].to(k_bias.dtype)
    return dq, dk, dq_weight, dq_bias, dk_weight, dk_bias, None, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)
