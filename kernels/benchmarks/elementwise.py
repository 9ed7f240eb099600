"""The kernels that move bytes, forward and backward, beside their reference compiled and eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.common import OURS, Ceilings, Row, measured, medians, num_bytes, rates, run
from benchmarks.peers import CONFIG, HEAD_DIM, LATENT_FRAMES, MAIN_SIZE, NUM_HEADS, NUM_TEXT, grid, num_tokens
from echovideo.model.rotary import rotary_tables
from echovideo_kernels import (
    column_sum,
    folded_query_scale,
    gelu_float8,
    modulated_norm,
    modulated_norm_,
    modulated_norm_float8_,
    qk_norm_rope,
    qk_norm_rope_,
    quantize_rows,
)
from echovideo_kernels.linear import gelu_float8_reference, quantize_rows_reference
from echovideo_kernels.modulated_norm import modulated_norm_reference
from echovideo_kernels.qk_norm_rope import qk_norm_rope_reference

BATCH = 2
LENGTH = num_tokens(*MAIN_SIZE)

Tensors = tuple[torch.Tensor, ...]


def measure(ceilings: Ceilings) -> Iterator[Row]:
    """Measure each operator at the main size, batch 2, against the bytes it cannot avoid moving."""
    # A compiled backward may otherwise overwrite what it saved, and could not be run again.
    torch._functorch.config.donated_buffer = False
    yield from _qk_norm_rope(ceilings)
    yield from _modulated_norm(ceilings)
    yield from _quantisation(ceilings)
    yield from _column_sum(ceilings)


def _compare(
    name: str,
    functions: dict[str, Callable[[], object]],
    amount: float,
    flops: float,
    ceilings: Ceilings,
) -> Iterator[Row]:
    times = medians(functions)
    yield measured(name, "bandwidth", rates(times, amount), "TB/s", ceilings.copy)
    yield measured(name, "time", times, "ms", amount / ceilings.copy / 1e9)
    yield Row(name=name, metric="intensity", value=flops / amount, unit="FLOP/byte")


def _backward_calls(
    forwards: dict[str, Callable[[], Tensors]], leaves: Sequence[torch.Tensor]
) -> tuple[dict[str, Callable[[], object]], Tensors]:
    """Return calls that make the gradients of the leaves, and the gradients of the outputs that they start from."""
    outputs = {name: forward() for name, forward in forwards.items()}
    grads = tuple(torch.randn_like(output) for output in outputs[OURS])

    def call(outputs: Tensors) -> Callable[[], object]:
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return {name: call(output) for name, output in outputs.items()}, grads


def _qk_norm_rope(ceilings: Ceilings) -> Iterator[Row]:
    q, k = (torch.randn(BATCH, LENGTH, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(2))
    affine = [torch.randn(HEAD_DIM, device="cuda").bfloat16() for _ in range(4)]
    tables = rotary_tables(LATENT_FRAMES, *grid(*MAIN_SIZE), device="cuda")
    scale = folded_query_scale(HEAD_DIM)
    compiled = torch.compile(qk_norm_rope_reference, dynamic=False)
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: qk_norm_rope(q, k, *affine, *tables, q_scale=scale),
        "torch.compile": lambda: compiled(q, k, *affine, *tables, q_scale=scale),
        "eager": lambda: qk_norm_rope_reference(q, k, *affine, *tables, q_scale=scale),
    }
    # A feature: LayerNorm 6 and its affine 2, the rotation 3; the scale, 1, is q's alone.
    amount, flops = num_bytes(q, k, q, k, *tables), 11.5 * (q.numel() + k.numel())
    yield from _compare("qk_norm_rope, forward", functions, amount, flops, ceilings)
    functions[OURS] = lambda: qk_norm_rope_(q, k, *affine, *tables, q_scale=scale)
    yield from _compare("qk_norm_rope_, in place", functions, amount, flops, ceilings)

    leaves = [q.requires_grad_(), k.requires_grad_(), *(x.requires_grad_() for x in affine)]
    forwards: dict[str, Callable[[], Tensors]] = {
        OURS: lambda: qk_norm_rope(q, k, *affine, *tables, q_scale=scale),
        "torch.compile": lambda: compiled(q, k, *affine, *tables, q_scale=scale),
        "eager": lambda: qk_norm_rope_reference(q, k, *affine, *tables, q_scale=scale),
    }
    calls, grads = _backward_calls(forwards, leaves)
    # Rotation 3, LayerNorm again 5, its derivative 9, the sums for weight and bias 3.
    yield from _compare(
        "qk_norm_rope, backward",
        calls,
        num_bytes(*grads, q, k, q, k, *tables),
        20.0 * (q.numel() + k.numel()),
        ceilings,
    )


def _modulated_norm(ceilings: Ceilings) -> Iterator[Row]:
    dim = CONFIG.inner_dim
    x, branch = (torch.randn(BATCH, LENGTH, dim, device="cuda").bfloat16() for _ in range(2))
    shift, scale, gate = (0.3 * torch.randn(BATCH, 2, dim, device="cuda").bfloat16() for _ in range(3))
    weight, bias = torch.randn(2, dim, device="cuda").bfloat16()
    sizes = {"num_text": NUM_TEXT, "eps": CONFIG.norm_eps}

    def arguments() -> Tensors:
        return x, shift, scale, weight, bias, branch, gate

    compiled, compiled_float8 = (
        torch.compile(f, dynamic=False) for f in (modulated_norm_reference, _modulated_norm_float8_reference)
    )
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: modulated_norm(*arguments(), **sizes),
        "torch.compile": lambda: compiled(*arguments(), **sizes),
        "eager": lambda: modulated_norm_reference(*arguments(), **sizes),
    }
    # A feature: gate and residual 2, LayerNorm 6, the affine and the modulation as one 2.
    amount, flops = num_bytes(x, branch, x, x), 10.0 * x.numel()
    yield from _compare("modulated_norm, forward", functions, amount, flops, ceilings)
    functions[OURS] = lambda: modulated_norm_(*arguments(), **sizes)
    yield from _compare("modulated_norm_, in place", functions, amount, flops, ceilings)
    functions = {
        OURS: lambda: modulated_norm_float8_(*arguments(), **sizes),
        "torch.compile": lambda: compiled_float8(*arguments(), **sizes),
        "eager": lambda: _modulated_norm_float8_reference(*arguments(), **sizes),
    }
    yield from _compare(
        "modulated_norm_float8_, in place",
        functions,
        num_bytes(x, branch, x) + x.numel(),
        flops + 2.0 * x.numel(),
        ceilings,
    )

    # In place, x grew by the gated branch at every run.
    x = torch.randn_like(x)
    leaves = [leaf.requires_grad_() for leaf in arguments()]
    forwards: dict[str, Callable[[], Tensors]] = {
        OURS: lambda: modulated_norm(*arguments(), **sizes),
        "torch.compile": lambda: compiled(*arguments(), **sizes),
        "eager": lambda: modulated_norm_reference(*arguments(), **sizes),
    }
    calls, grads = _backward_calls(forwards, leaves)
    # LayerNorm again 5, its derivative 9, residual, gate and branch 2, the sums for shift, scale and gate 5.
    yield from _compare(
        "modulated_norm, backward", calls, num_bytes(*grads, x, branch, x, branch), 21.0 * x.numel(), ceilings
    )


def _modulated_norm_float8_reference(*tensors: torch.Tensor, num_text: int, eps: float) -> Tensors:
    residual, y = modulated_norm_reference(*tensors, num_text=num_text, eps=eps)
    return residual, *quantize_rows_reference(y)


def _quantisation(ceilings: Ceilings) -> Iterator[Row]:
    # GELU 8, the largest magnitude 2, the quotient 1.
    for name, operator, reference, width, flops in (
        ("gelu_float8", gelu_float8, gelu_float8_reference, 4 * CONFIG.inner_dim, 11.0),
        ("quantize_rows", quantize_rows, quantize_rows_reference, CONFIG.inner_dim, 3.0),
    ):
        x = torch.randn(BATCH, LENGTH, width, device="cuda").bfloat16()
        functions = {
            OURS: _applied(operator, x),
            "torch.compile": _applied(torch.compile(reference, dynamic=False), x),
            "eager": _applied(reference, x),
        }
        yield from _compare(name, functions, num_bytes(x) + x.numel(), flops * x.numel(), ceilings)


def _applied(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    return lambda: function(x)


def _column_sum(ceilings: Ceilings) -> Iterator[Row]:
    x = torch.randn(LENGTH, 4 * CONFIG.inner_dim, device="cuda").bfloat16()
    compiled = torch.compile(lambda x: x.sum(dim=0), dynamic=False)
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: column_sum(x),
        "torch.compile": lambda: compiled(x),
        "eager": lambda: x.sum(dim=0),
    }
    yield from _compare("column_sum", functions, num_bytes(x), float(x.numel()), ceilings)


if __name__ == "__main__":
    run("elementwise", measure)
