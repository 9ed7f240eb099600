"""GPU operators of the EchoVideo transformer, each beside a plain PyTorch reference."""

from echovideo_kernels.attention import attention
from echovideo_kernels.linear import column_sum, gelu_float8, linear, linear_float8, linear_gelu, quantize_rows
from echovideo_kernels.modulated_norm import modulated_norm, modulated_norm_, modulated_norm_float8_
from echovideo_kernels.qk_norm_rope import FOLDED_SCALE, folded_query_scale, qk_norm_rope, qk_norm_rope_

__all__ = [
    "FOLDED_SCALE",
    "attention",
    "column_sum",
    "folded_query_scale",
    "gelu_float8",
    "linear",
    "linear_float8",
    "linear_gelu",
    "modulated_norm",
    "modulated_norm_",
    "modulated_norm_float8_",
    "qk_norm_rope",
    "qk_norm_rope_",
    "quantize_rows",
]
