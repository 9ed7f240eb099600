"""Gated residual, LayerNorm and modulation by the timestep in one pass over the joint text-video tokens."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F

from echovideo_kernels._triton import jit, tl, triton
from echovideo_kernels.dispatch import options, serves
from echovideo_kernels.linear import float8_scale, quantize_rows_reference


def modulated_norm(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None = None,
    gate_B2D: torch.Tensor | None = None,
    *,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x' = x + gate * branch and y = (LayerNorm(x') * weight + bias) * (1 + scale) + shift, both (B, N, D).

    The first `num_text` tokens are text, the others video; shift, scale and gate act on the video with their index 0
    and on the text with 1. The gate is the branch's, so it usually comes from an earlier norm than shift and scale.
    Without a branch x' is x itself. x' is rounded to its dtype before it is normed; all else is computed in float32
    and rounded once. Raises ValueError for shapes, dtypes or strides it cannot take.
    """
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _check(*tensors, num_text)
    if not serves("modulated_norm", x_BND, x_BND.shape[1]):
        return modulated_norm_reference(*tensors, num_text=num_text, eps=eps)
    residual_BND, y_BND = _modulated_norm(*tensors, num_text, eps)
    return x_BND if branch_BND is None else residual_BND, y_BND


def modulated_norm_(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None = None,
    gate_B2D: torch.Tensor | None = None,
    *,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `modulated_norm` does with x' in the memory of x; for inference, without a derivative."""
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _check(*tensors, num_text)
    if not serves("modulated_norm", x_BND, x_BND.shape[1]):
        residual_BND, y_BND = modulated_norm_reference(*tensors, num_text=num_text, eps=eps)
        return x_BND.copy_(residual_BND), y_BND
    return x_BND, _modulated_norm_(*tensors, num_text, eps)


def modulated_norm_float8_(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None = None,
    gate_B2D: torch.Tensor | None = None,
    *,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `modulated_norm_` does with y quantised for a row-wise FP8 linear layer.

    Returns x', y / y_scale as float8_e4m3fn (B, N, D), and y_scale = max|y| / 448 of each row, float32 (B, N).
    """
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _check(*tensors, num_text)
    if not serves("modulated_norm", x_BND, x_BND.shape[1]):
        residual_BND, y_BND = _reference(*tensors, num_text, eps)
        return x_BND.copy_(residual_BND), *quantize_rows_reference(y_BND)
    return x_BND, *_modulated_norm_float8_(*tensors, num_text, eps)


def modulated_norm_reference(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None = None,
    gate_B2D: torch.Tensor | None = None,
    *,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `modulated_norm` does in plain PyTorch: in float64 for float64 inputs, else in float32."""
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    residual_BND, y_BND = _reference(*tensors, num_text, eps)
    return residual_BND, y_BND.to(x_BND.dtype)


def _reference(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x' in x's dtype, and y unrounded."""
    dtype = torch.promote_types(x_BND.dtype, torch.float32)
    num_video = x_BND.shape[1] - num_text

    def per_token(modulation_B2D: torch.Tensor) -> torch.Tensor:
        video, text = modulation_B2D.to(dtype)[:, :, None].unbind(dim=1)
        return torch.cat([text.expand(-1, num_text, -1), video.expand(-1, num_video, -1)], dim=1)

    if branch_BND is not None and gate_B2D is not None:
        x_BND = (x_BND.to(dtype) + per_token(gate_B2D) * branch_BND.to(dtype)).to(x_BND.dtype)
    normed = F.layer_norm(x_BND.to(dtype), x_BND.shape[-1:], weight_D.to(dtype), bias_D.to(dtype), eps)
    return x_BND, normed * (1 + per_token(scale_B2D)) + per_token(shift_B2D)


def _check(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
) -> None:
    if x_BND.ndim != 3 or not 0 <= num_text <= x_BND.shape[1]:
        raise ValueError(f"x must be (B, N, D) with {num_text} text tokens among its N, not {tuple(x_BND.shape)}")
    batch, _, dim = x_BND.shape
    for name, tensor in (("shift", shift_B2D), ("scale", scale_B2D), ("gate", gate_B2D)):
        if tensor is not None and tensor.shape != (batch, 2, dim):
            raise ValueError(f"{name} must be ({batch}, 2, {dim}), not {tuple(tensor.shape)}")
    if weight_D.shape != (dim,) or bias_D.shape != (dim,):
        raise ValueError(f"weight and bias must be ({dim},), not {tuple(weight_D.shape)} and {tuple(bias_D.shape)}")
    if (branch_BND is None) != (gate_B2D is None):
        raise ValueError("a branch and its gate come together")
    if branch_BND is not None and (branch_BND.shape != x_BND.shape or branch_BND.dtype != x_BND.dtype):
        raise ValueError(
            f"the branch must be {tuple(x_BND.shape)} {x_BND.dtype}, as x is, "
            f"not {tuple(branch_BND.shape)} {branch_BND.dtype}"
        )


def _check_kernel(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        if not 0 < tensor.shape[-1] <= 4096:
            raise ValueError(f"the kernel takes widths of 1 to 4096, not {tensor.shape[-1]}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"the features of a token must be adjacent in memory, not {tensor.stride(-1)} apart")


@jit
@no_type_check
def _stream(num_tokens, num_text, TOKENS: tl.constexpr):
    """Return this program's stream (0 video, 1 text) and its first token and the one after its last."""
    program = tl.program_id(0)
    text_programs = tl.cdiv(num_text, TOKENS)
    is_text = program < text_programs
    start = tl.where(is_text, program * TOKENS, num_text + (program - text_programs) * TOKENS)
    end = tl.minimum(start + TOKENS, tl.where(is_text, num_text, num_tokens))
    return is_text.to(tl.int64), start, end


@jit
@no_type_check
def _vectors(ptr, D: tl.constexpr, CHUNK: tl.constexpr):
    vectors = ()
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        vectors += (tl.load(ptr + at, mask=at < D, other=0.0).to(tl.float32),)
    return vectors


@jit
@no_type_check
def _normed(chunks, eps, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Return the chunks of rows normed, and 1 / their standard deviation."""
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        total += chunks[chunk]
    mean = (tl.sum(total, axis=1) / D)[:, None]
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    centred = ()
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        x = tl.where(at < D, chunks[chunk] - mean, 0.0)
        squares += x * x
        centred += (x,)
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    normed = ()
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        normed += (centred[chunk] * rstd,)
    return normed, rstd


@jit
@no_type_check
def _forward_kernel(
    x_ptr,
    branch_ptr,
    residual_ptr,
    y_ptr,
    y_scale_ptr,
    x_strides,
    branch_strides,
    residual_strides,
    shift_ptr,
    scale_ptr,
    gate_ptr,
    shift_strides,
    scale_strides,
    gate_strides,
    weight_ptr,
    bias_ptr,
    num_tokens,
    num_text,
    eps,
    HAS_BRANCH: tl.constexpr,
    FLOAT8: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # A program goes through TOKENS tokens of one stream, ROWS at a time, with STAGES of them on their way from memory.
    # It holds a row as tiles of CHUNK features.
    batch = tl.program_id(1).to(tl.int64)
    stream, start, end = _stream(num_tokens, num_text, TOKENS)
    # LayerNorm's affine and the modulation are one: normed * factor + offset.
    weight, bias = _vectors(weight_ptr, D, CHUNK), _vectors(bias_ptr, D, CHUNK)
    shift = _vectors(shift_ptr + batch * shift_strides[0] + stream * shift_strides[1], D, CHUNK)
    scale = _vectors(scale_ptr + batch * scale_strides[0] + stream * scale_strides[1], D, CHUNK)
    factor = ()
    offset = ()
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        factor += (weight[chunk] * (1.0 + scale[chunk]),)
        offset += (bias[chunk] * (1.0 + scale[chunk]) + shift[chunk],)
    if HAS_BRANCH:
        gate = _vectors(gate_ptr + batch * gate_strides[0] + stream * gate_strides[1], D, CHUNK)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        row = token.to(tl.int64)[:, None]
        x_row = x_ptr + batch * x_strides[0] + row * x_strides[1]
        chunks = ()
        for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
            at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
            mask = (token < end)[:, None] & (at < D)
            x = tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_BRANCH:
                branch_row = branch_ptr + batch * branch_strides[0] + row * branch_strides[1]
                residual_row = residual_ptr + batch * residual_strides[0] + row * residual_strides[1]
                x += gate[chunk] * tl.load(branch_row + at, mask=mask, other=0.0).to(tl.float32)
                rounded = x.to(residual_ptr.dtype.element_ty)
                tl.store(residual_row + at, rounded, mask=mask)
                x = rounded.to(tl.float32)
            chunks += (x,)
        normed, _ = _normed(chunks, eps, D, CHUNK, ROWS)
        y_row = y_ptr + (batch * num_tokens + row) * D
        if FLOAT8:
            absmax = tl.zeros((ROWS, CHUNK), tl.float32)
            for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
                absmax = tl.maximum(absmax, tl.abs(normed[chunk] * factor[chunk] + offset[chunk]))
            y_scale = float8_scale(tl.max(absmax, axis=1))
            tl.store(y_scale_ptr + batch * num_tokens + token, y_scale, mask=token < end)
            inverse = (1.0 / y_scale)[:, None]
        for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
            at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
            y = normed[chunk] * factor[chunk] + offset[chunk]
            if FLOAT8:
                y = (y * inverse).to(tl.float8e4nv)
            tl.store(y_row + at, y, mask=(token < end)[:, None] & (at < D))


@jit
@no_type_check
def _backward_kernel(
    x_ptr,
    branch_ptr,
    dresidual_ptr,
    dy_ptr,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    x_strides,
    branch_strides,
    dresidual_strides,
    dy_strides,
    scale_ptr,
    gate_ptr,
    scale_strides,
    gate_strides,
    weight_ptr,
    num_tokens,
    num_text,
    eps,
    HAS_BRANCH: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    stream, start, end = _stream(num_tokens, num_text, TOKENS)
    weight = _vectors(weight_ptr, D, CHUNK)
    scale = _vectors(scale_ptr + batch * scale_strides[0] + stream * scale_strides[1], D, CHUNK)
    factor = ()
    sum_dy = ()
    sum_dy_normed = ()
    sum_dgate = ()
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        factor += (weight[chunk] * (1.0 + scale[chunk]),)
        sum_dy += (tl.zeros((ROWS, CHUNK), tl.float32),)
        sum_dy_normed += (tl.zeros((ROWS, CHUNK), tl.float32),)
        sum_dgate += (tl.zeros((ROWS, CHUNK), tl.float32),)
    if HAS_BRANCH:
        gate = _vectors(gate_ptr + batch * gate_strides[0] + stream * gate_strides[1], D, CHUNK)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        row = token.to(tl.int64)[:, None]
        chunks = ()
        grads = ()
        for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
            at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
            mask = (token < end)[:, None] & (at < D)
            x_row = x_ptr + batch * x_strides[0] + row * x_strides[1]
            dy_row = dy_ptr + batch * dy_strides[0] + row * dy_strides[1]
            chunks += (tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32),)
            grads += (tl.load(dy_row + at, mask=mask, other=0.0).to(tl.float32),)
        normed, rstd = _normed(chunks, eps, D, CHUNK, ROWS)
        total = tl.zeros((ROWS, CHUNK), tl.float32)
        total_normed = tl.zeros((ROWS, CHUNK), tl.float32)
        new_sum_dy = ()
        new_sum_dy_normed = ()
        for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
            new_sum_dy += (sum_dy[chunk] + grads[chunk],)
            new_sum_dy_normed += (sum_dy_normed[chunk] + grads[chunk] * normed[chunk],)
            total += grads[chunk] * factor[chunk]
            total_normed += grads[chunk] * factor[chunk] * normed[chunk]
        sum_dy = new_sum_dy
        sum_dy_normed = new_sum_dy_normed
        mean = (tl.sum(total, axis=1) / D)[:, None]
        mean_normed = (tl.sum(total_normed, axis=1) / D)[:, None]
        new_sum_dgate = ()
        for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
            at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
            mask = (token < end)[:, None] & (at < D)
            dx = rstd * (grads[chunk] * factor[chunk] - mean - normed[chunk] * mean_normed)
            out = (batch * num_tokens + row) * D + at
            if HAS_BRANCH:
                branch_row = branch_ptr + batch * branch_strides[0] + row * branch_strides[1]
                dresidual_row = dresidual_ptr + batch * dresidual_strides[0] + row * dresidual_strides[1]
                dx += tl.load(dresidual_row + at, mask=mask, other=0.0).to(tl.float32)
                branch = tl.load(branch_row + at, mask=mask, other=0.0).to(tl.float32)
                new_sum_dgate += (sum_dgate[chunk] + dx * branch,)
                tl.store(dbranch_ptr + out, dx * gate[chunk], mask=mask)
            tl.store(dx_ptr + out, dx, mask=mask)
        if HAS_BRANCH:
            sum_dgate = new_sum_dgate
    sums = sums_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * 3 * D
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums + at, tl.sum(sum_dy[chunk], axis=0), mask=at < D)
        tl.store(sums + D + at, tl.sum(sum_dy_normed[chunk], axis=0), mask=at < D)
        tl.store(sums + 2 * D + at, tl.sum(sum_dgate[chunk], axis=0), mask=at < D)


def _launch_forward(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
    residual_BND: torch.Tensor,
    y_BND: torch.Tensor,
    y_scale_BN: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> None:
    """Write x' into `residual_BND` if there is a branch, and y into the contiguous `y_BND`, in FP8 with its scales."""
    _check_kernel(x_BND, shift_B2D, scale_B2D, branch_BND, gate_B2D, residual_BND)
    config = config or options("modulated_norm", x_BND)
    batch, num_tokens, dim = x_BND.shape
    branch, gate = (x_BND, scale_B2D) if branch_BND is None or gate_B2D is None else (branch_BND, gate_B2D)
    _forward_kernel[_num_programs(num_tokens, num_text, config), batch](
        x_BND,
        branch,
        residual_BND,
        y_BND,
        y_scale_BN,
        x_BND.stride()[:2],
        branch.stride()[:2],
        residual_BND.stride()[:2],
        shift_B2D,
        scale_B2D,
        gate,
        shift_B2D.stride()[:2],
        scale_B2D.stride()[:2],
        gate.stride()[:2],
        weight_D.contiguous(),
        bias_D.contiguous(),
        num_tokens,
        num_text,
        eps,
        HAS_BRANCH=branch_BND is not None,
        FLOAT8=y_scale_BN is not None,
        D=dim,
        **_fitted(config, dim),
    )


def _launch_backward(
    x_BND: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
    dresidual_BND: torch.Tensor,
    dy_BND: torch.Tensor,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, dbranch (empty without a branch) and float32 sums_B23D: of dy, dy * LayerNorm(x') and dgate."""
    dresidual_BND, dy_BND = (g if g.stride(-1) == 1 else g.contiguous() for g in (dresidual_BND, dy_BND))
    _check_kernel(x_BND, scale_B2D, branch_BND, gate_B2D)
    config = config or options("modulated_norm_backward", x_BND)
    batch, num_tokens, dim = x_BND.shape
    dx_BND = x_BND.new_empty(x_BND.shape)
    dbranch_BND = x_BND.new_empty(x_BND.shape if branch_BND is not None else 0)
    branch, gate = (x_BND, scale_B2D) if branch_BND is None or gate_B2D is None else (branch_BND, gate_B2D)
    num_programs = _num_programs(num_tokens, num_text, config)
    sums = x_BND.new_empty((batch, num_programs, 3, dim), dtype=torch.float32)
    _backward_kernel[num_programs, batch](
        x_BND,
        branch,
        dresidual_BND,
        dy_BND,
        dx_BND,
        dbranch_BND,
        sums,
        x_BND.stride()[:2],
        branch.stride()[:2],
        dresidual_BND.stride()[:2],
        dy_BND.stride()[:2],
        scale_B2D,
        gate,
        scale_B2D.stride()[:2],
        gate.stride()[:2],
        weight_D.contiguous(),
        num_tokens,
        num_text,
        eps,
        HAS_BRANCH=branch_BND is not None,
        D=dim,
        **_fitted(config, dim),
    )
    text, video = sums.tensor_split([triton.cdiv(num_text, config["TOKENS"])], dim=1)
    return dx_BND, dbranch_BND, torch.stack([video.sum(dim=1), text.sum(dim=1)], dim=1)


def _num_programs(num_tokens: int, num_text: int, config: dict[str, int]) -> int:
    text: int = triton.cdiv(num_text, config["TOKENS"])
    video: int = triton.cdiv(num_tokens - num_text, config["TOKENS"])
    return text + video


def _fitted(config: dict[str, int], dim: int) -> dict[str, int]:
    """Return the options with tiles no wider than a row: what that leaves of a tile is filled with further rows."""
    chunk = min(config["CHUNK"], triton.next_power_of_2(dim))
    return {**config, "CHUNK": chunk, "ROWS": min(config["TOKENS"], config["ROWS"] * config["CHUNK"] // chunk)}


@torch.library.custom_op("echovideo::modulated_norm", mutates_args=())
def _modulated_norm(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator may not return its input: without a branch, x' is left to the caller.
    residual_BND, y_BND = x_BND.new_empty(x_BND.shape if branch_BND is not None else 0), x_BND.new_empty(x_BND.shape)
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _launch_forward(*tensors, num_text, eps, x_BND if branch_BND is None else residual_BND, y_BND)
    return residual_BND, y_BND


@_modulated_norm.register_fake
def _(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BND.new_empty(x_BND.shape if branch_BND is not None else 0), x_BND.new_empty(x_BND.shape)


@torch.library.custom_op("echovideo::modulated_norm_", mutates_args=("x_BND",))
def _modulated_norm_(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
) -> torch.Tensor:
    y_BND = x_BND.new_empty(x_BND.shape)
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _launch_forward(*tensors, num_text, eps, x_BND, y_BND)
    return y_BND


@_modulated_norm_.register_fake
def _(x_BND: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_BND.new_empty(x_BND.shape)


@torch.library.custom_op("echovideo::modulated_norm_float8_", mutates_args=("x_BND",))
def _modulated_norm_float8_(
    x_BND: torch.Tensor,
    shift_B2D: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y_BND = x_BND.new_empty(x_BND.shape, dtype=torch.float8_e4m3fn)
    y_scale_BN = x_BND.new_empty(x_BND.shape[:2], dtype=torch.float32)
    tensors = (x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D)
    _launch_forward(*tensors, num_text, eps, x_BND, y_BND, y_scale_BN)
    return y_BND, y_scale_BN


@_modulated_norm_float8_.register_fake
def _(x_BND: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y_scale_BN = x_BND.new_empty(x_BND.shape[:2], dtype=torch.float32)
    return x_BND.new_empty(x_BND.shape, dtype=torch.float8_e4m3fn), y_scale_BN


@torch.library.custom_op("echovideo::modulated_norm_backward", mutates_args=())
def _modulated_norm_backward(
    x_BND: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    gate_B2D: torch.Tensor | None,
    num_text: int,
    eps: float,
    dresidual_BND: torch.Tensor,
    dy_BND: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (x_BND, scale_B2D, weight_D, branch_BND, gate_B2D)
    return _launch_backward(*tensors, num_text, eps, dresidual_BND, dy_BND)


@_modulated_norm_backward.register_fake
def _(
    x_BND: torch.Tensor,
    scale_B2D: torch.Tensor,
    weight_D: torch.Tensor,
    branch_BND: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dbranch_BND = x_BND.new_empty(x_BND.shape if branch_BND is not None else 0)
    sums_B23D = x_BND.new_empty((len(x_BND), 2, 3, x_BND.shape[-1]), dtype=torch.float32)
    return x_BND.new_empty(x_BND.shape), dbranch_BND, sums_B23D


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_BND, shift_B2D, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D, num_text, eps = inputs
    residual_BND, _ = output
    ctx.num_text, ctx.eps, ctx.shift_dtype = num_text, eps, shift_B2D.dtype
    ctx.save_for_backward(
        x_BND if branch_BND is None else residual_BND, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D
    )


def _backward(ctx: Any, dresidual_BND: torch.Tensor, dy_BND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_BND, scale_B2D, weight_D, bias_D, branch_BND, gate_B2D = ctx.saved_tensors
    dx_BND, dbranch_BND, sums_B23D = _modulated_norm_backward(
        x_BND, scale_B2D, weight_D, branch_BND, gate_B2D, ctx.num_text, ctx.eps, dresidual_BND, dy_BND
    )
    sum_dy, sum_dy_normed, dgate = sums_B23D.unbind(dim=2)
    dscale = sum_dy_normed * weight_D + sum_dy * bias_D
    dweight = (sum_dy_normed * (1 + scale_B2D)).sum(dim=(0, 1))
    dbias = (sum_dy * (1 + scale_B2D)).sum(dim=(0, 1))
    return (
        dx_BND,
        sum_dy.to(ctx.shift_dtype),
        dscale.to(scale_B2D.dtype),
        dweight.to(weight_D.dtype),
        dbias.to(bias_D.dtype),
        None if branch_BND is None else dbranch_BND,
        None if gate_B2D is None else dgate.to(gate_B2D.dtype),
        None,
        None,
    )


_modulated_norm.register_autograd(_backward, setup_context=_setup_context)
