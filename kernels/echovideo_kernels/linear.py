"""Linear layers: for training, with GELU in the product's epilogue, and row-wise FP8 ones with their quantisation."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F

from echovideo_kernels._triton import jit, tl, triton
from echovideo_kernels.dispatch import options, serves

_FLOAT8_MAX = 448.0
_MIN_SCALE = 1e-30  # Keeps a row of zeros from a division by zero.


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b, (..., O) for x (..., I), as PyTorch does; a trained bias gets its gradient by `column_sum`."""
    if bias_O is None or not (bias_O.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight_OI, bias_O)
    out: torch.Tensor = _BiasGradient.apply(F.linear(x, weight_OI, bias_O.detach()), bias_O)  # type: ignore[no-untyped-call]
    return out


def column_sum(x_RO: torch.Tensor) -> torch.Tensor:
    """Return the sum of the rows, (O,) in x's dtype, summed in float32 in an order that only the shape decides."""
    if not serves("column_sum", x_RO, len(x_RO)):
        return x_RO.sum(dim=0)
    total_O: torch.Tensor = _column_sum(x_RO)
    return total_O


def linear_gelu(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """Return GELU(x W^T + b), tanh form, as (..., O) for x (..., I), all of one dtype.

    For inference: on CUDA, cuBLASLt applies bias and GELU in the product's epilogue, and what the derivative needs is
    never in memory. Raises ValueError for shapes or dtypes that do not fit.
    """
    if weight_OI.ndim != 2 or x.shape[-1:] != weight_OI.shape[1:] or bias_O.shape != weight_OI.shape[:1]:
        raise ValueError(
            f"a linear layer takes x (..., I), weight (O, I) and bias (O,), not "
            f"{tuple(x.shape)}, {tuple(weight_OI.shape)} and {tuple(bias_O.shape)}"
        )
    if not x.dtype == weight_OI.dtype == bias_O.dtype:
        raise ValueError(f"x, weight and bias must share a dtype, and are {x.dtype}, {weight_OI.dtype}, {bias_O.dtype}")
    out: torch.Tensor = _linear_gelu(x, weight_OI, bias_O)
    return out


def linear_gelu_reference(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """Do what `linear_gelu` does in plain PyTorch."""
    return F.gelu(F.linear(x, weight_OI, bias_O), approximate="tanh")


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / scale as float8_e4m3fn (..., I) and scale = max|x| / 448 of each row, float32 (...)."""
    if not serves("quantize_rows", x, x.numel() // x.shape[-1]):
        return quantize_rows_reference(x)
    x_float8, scale = _quantize_rows(x, False)
    return x_float8, scale


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `quantize_rows` does in plain PyTorch: in float64 for float64 inputs, else in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (x.abs().amax(dim=-1).clamp_min(_MIN_SCALE) / _FLOAT8_MAX).float()
    return (x / scale[..., None]).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn), scale


def gelu_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `quantize_rows` of GELU(x), tanh form, in one pass: for the linear layer that follows a GELU."""
    if not serves("quantize_rows", x, x.numel() // x.shape[-1]):
        return gelu_float8_reference(x)
    x_float8, scale = _quantize_rows(x, True)
    return x_float8, scale


def gelu_float8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `gelu_float8` does in plain PyTorch: in float64 for float64 inputs, else in float32."""
    return quantize_rows_reference(F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate="tanh"))


def linear_float8(
    x_float8: torch.Tensor,
    x_scale: torch.Tensor,
    weight_float8_OI: torch.Tensor,
    weight_scale_O: torch.Tensor,
    bias_O: torch.Tensor,
) -> torch.Tensor:
    """Return x W^T + b in bfloat16, (..., O), of an x (..., I) and a weight that `quantize_rows` made; for inference.

    Raises ValueError for shapes or dtypes that do not fit, for widths that 16 does not divide, and on a GPU of CUDA
    capability below 9.0, which has no row-wise FP8 product.
    """
    if x_float8.dtype != torch.float8_e4m3fn or weight_float8_OI.dtype != torch.float8_e4m3fn:
        raise ValueError(f"x and weight must be float8_e4m3fn, and are {x_float8.dtype} and {weight_float8_OI.dtype}")
    if (
        weight_float8_OI.ndim != 2
        or x_float8.shape[-1:] != weight_float8_OI.shape[1:]
        or x_scale.shape != x_float8.shape[:-1]
        or not weight_scale_O.shape == bias_O.shape == weight_float8_OI.shape[:1]
        or any(width % 16 for width in weight_float8_OI.shape)
    ):
        raise ValueError(
            "an FP8 linear layer takes x (..., I), its scale (...), weight (O, I), its scale (O,) and bias (O,), with "
            f"I and O divisible by 16, not {tuple(x_float8.shape)}, {tuple(x_scale.shape)}, "
            f"{tuple(weight_float8_OI.shape)}, {tuple(weight_scale_O.shape)} and {tuple(bias_O.shape)}"
        )
    out: torch.Tensor = _linear_float8(x_float8, x_scale, weight_float8_OI, weight_scale_O, bias_O)
    return out


@torch.library.custom_op("echovideo::linear_float8", mutates_args=())
def _linear_float8(
    x_float8: torch.Tensor,
    x_scale: torch.Tensor,
    weight_float8_OI: torch.Tensor,
    weight_scale_O: torch.Tensor,
    bias_O: torch.Tensor,
) -> torch.Tensor:
    if not x_float8.is_cuda:
        return linear_float8_reference(x_float8, x_scale, weight_float8_OI, weight_scale_O, bias_O)
    capability = torch.cuda.get_device_capability(x_float8.device)
    if capability < (9, 0):
        raise ValueError(f"row-wise FP8 products need CUDA capability 9.0, and this GPU's is {capability}")
    out: torch.Tensor = torch._scaled_mm(
        x_float8.reshape(-1, x_float8.shape[-1]),
        weight_float8_OI.t(),
        scale_a=x_scale.reshape(-1, 1),
        scale_b=weight_scale_O.reshape(1, -1),
        bias=bias_O.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(*x_float8.shape[:-1], len(bias_O))


@_linear_float8.register_fake
def _(x_float8: torch.Tensor, x_scale: torch.Tensor, weight_float8_OI: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_float8.new_empty((*x_float8.shape[:-1], len(weight_float8_OI)), dtype=torch.bfloat16)


def linear_float8_reference(
    x_float8: torch.Tensor,
    x_scale: torch.Tensor,
    weight_float8_OI: torch.Tensor,
    weight_scale_O: torch.Tensor,
    bias_O: torch.Tensor,
) -> torch.Tensor:
    """Do what `linear_float8` does in plain PyTorch, in float32."""
    x, weight = x_float8.float() * x_scale[..., None], weight_float8_OI.float() * weight_scale_O[:, None]
    return F.linear(x, weight, bias_O.float()).to(torch.bfloat16)


class _BiasGradient(torch.autograd.Function):
    """Gives a bias the gradient of a product to which it was added; it keeps nothing for that."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dout, column_sum(dout.reshape(-1, dout.shape[-1]))


@torch.library.custom_op("echovideo::column_sum", mutates_args=())
def _column_sum(x_RO: torch.Tensor) -> torch.Tensor:
    return _launch_column_sum(x_RO)


@_column_sum.register_fake
def _(x_RO: torch.Tensor) -> torch.Tensor:
    return x_RO.new_empty(x_RO.shape[1:])


def _launch_column_sum(x_RO: torch.Tensor, config: dict[str, int] | None = None) -> torch.Tensor:
    config = dict(config or options("column_sum", x_RO))
    x_RO = x_RO if x_RO.stride(1) == 1 else x_RO.contiguous()
    num_rows, width = x_RO.shape
    columns = triton.cdiv(width, config["COLUMNS"])
    parts = max(1, min(config.pop("PROGRAMS") // columns, triton.cdiv(num_rows, config["ROWS"])))
    sums_PO = x_RO.new_empty((parts, width), dtype=torch.float32)
    _column_sum_kernel[columns, parts](x_RO, sums_PO, num_rows, x_RO.stride(0), WIDTH=width, **config)
    return sums_PO.sum(dim=0).to(x_RO.dtype)


@jit
@no_type_check
def _column_sum_kernel(
    x_ptr, sums_ptr, num_rows, row_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # A program sums every so-many-th tile of ROWS rows and COLUMNS features.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=3):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(1) * WIDTH + column, tl.sum(total, axis=0), mask=column < WIDTH)


@torch.library.custom_op("echovideo::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:  # There the operator below is GELU's erf form.
        return linear_gelu_reference(x, weight_OI, bias_O)
    rows = x.reshape(-1, x.shape[-1])
    out: torch.Tensor = torch.ops.aten._addmm_activation(bias_O, rows, weight_OI.t(), use_gelu=True)
    return out.view(*x.shape[:-1], len(bias_O))


@_linear_gelu.register_fake
def _(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(bias_O)))


@torch.library.custom_op("echovideo::quantize_rows", mutates_args=())
def _quantize_rows(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_quantize(x, gelu)


@_quantize_rows.register_fake
def _(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_quantize(
    x: torch.Tensor, gelu: bool, config: dict[str, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not 0 < x.shape[-1] <= 16384:
        raise ValueError(f"the kernel quantises rows of 1 to 16384 features, not {x.shape[-1]}")
    config = config or options("quantize_rows", x)
    x = x.contiguous()
    x_float8 = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if scale.numel():
        _quantize_kernel[scale.numel(),](x, x_float8, scale, WIDTH=x.shape[-1], GELU=gelu, **config)
    return x_float8, scale


@jit
@no_type_check
def float8_scale(absmax):
    """Return the scale that takes values up to `absmax` to float8_e4m3fn's largest."""
    return tl.maximum(absmax, 1e-30) / 448.0


@jit
@no_type_check
def _quantize_kernel(x_ptr, out_ptr, scale_ptr, WIDTH: tl.constexpr, GELU: tl.constexpr, CHUNK: tl.constexpr):
    # A row is held as tiles of CHUNK features.
    row = tl.program_id(0)
    start = row.to(tl.int64) * WIDTH
    chunks = ()
    absmax = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + start + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        if GELU:
            # GELU(x) = x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). A reciprocal root, squared, is
            # two instructions; a division is ten, and with it the kernel would wait for arithmetic, not for memory.
            root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))
            x = x * root * root
        absmax = tl.maximum(absmax, tl.abs(x))
        chunks += (x,)
    scale = float8_scale(tl.max(absmax, axis=0))
    inverse = 1.0 / scale
    for chunk in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(out_ptr + start + at, (chunks[chunk] * inverse).to(tl.float8e4nv), mask=at < WIDTH)
    tl.store(scale_ptr + row, scale)
