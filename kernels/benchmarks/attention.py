"""Attention forward and backward at the published sizes, beside everything else that a user could install."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import (
    OURS,
    Ceilings,
    Row,
    Timing,
    measured,
    medians,
    num_bytes,
    rates,
    reason,
    relative_error,
    run,
)
from benchmarks.peers import (
    CUDNN,
    FLASH_ATTENTION_2,
    FLASH_ATTENTION_4,
    FLEX_ATTENTION,
    HEAD_DIM,
    LATENT_FRAMES,
    MAIN_SIZE,
    NUM_HEADS,
    NUM_TEXT,
    SAMPLED_HEADS,
    Attention,
    exact_sample,
    grid,
    inputs,
    num_tokens,
    peers,
    published_lengths,
    sample,
)
from echovideo.model.rotary import rotary_tables
from echovideo_kernels import FOLDED_SCALE, attention, folded_query_scale, qk_norm_rope
from echovideo_kernels.dispatch import serves
from echovideo_kernels.qk_norm_rope import qk_norm_rope_reference

# The package exports the function under the module's name.
module = importlib.import_module("echovideo_kernels.attention")

MAIN_LENGTH = num_tokens(*MAIN_SIZE)
MAIN_NAME = f"{MAIN_SIZE[1]}x{MAIN_SIZE[0]}"
_FAILING_GAIN = 8.0
_NO_LIMIT = 1e30


def measure(ceilings: Ceilings) -> Iterator[Row]:
    """Measure the forward at every published size, with failing heads, after its prologue, and the backward."""
    assert serves("attention", torch.empty(0, device="cuda"), MAIN_LENGTH), "this chip is not in tuned.json"
    for length, names in published_lengths().items():
        for batch in (1, 2):
            yield from _forward(f"forward, {names}, batch {batch}", batch, length, ceilings)
    for share, heads in (("10%", range(NUM_HEADS - 5, NUM_HEADS)), ("100%", range(NUM_HEADS))):
        yield from _failing(f"forward, {MAIN_NAME}, batch 2, {share} of heads fail", heads, ceilings)
    for batch in (1, 2):
        yield from _with_prologue(f"norm, rotary and attention, {MAIN_NAME}, batch {batch}", batch, ceilings)
    for gain in (1.0, 2.0, 3.0):
        yield from _error_with_prologue(f"norm, rotary and attention, gain {gain:g}", gain)
    yield from _backward(f"backward, {MAIN_NAME}, batch 1", ceilings)


def forward_flops(batch: int, length: int) -> float:
    """Return the FLOPs of both products."""
    return 4.0 * batch * NUM_HEADS * length**2 * HEAD_DIM


def _rows(name: str, times: Mapping[str, Timing], flops: float, ceilings: Ceilings) -> Iterator[Row]:
    yield measured(name, "throughput", rates(times, flops), "TFLOP/s", ceilings.matmul)
    yield measured(name, "time", times, "ms", flops / ceilings.matmul / 1e9)


def _forward(name: str, batch: int, length: int, ceilings: Ceilings) -> Iterator[Row]:
    q, k, v = inputs(batch, length)
    calls = _calls({OURS: attention, **peers()}, q, k, v)
    if length != MAIN_LENGTH:
        calls[FLEX_ATTENTION] = "compiled, for a quarter of a minute, at the main size alone"
    times = medians(calls)
    flops = forward_flops(batch, length)
    yield from _rows(name, times, flops, ceilings)
    yield measured(name, "relative error", _errors(calls, times, exact_sample(q, k, v, FOLDED_SCALE)), "")
    if length == MAIN_LENGTH and batch == 2:
        yield Row(name=name, metric="intensity", value=flops / num_bytes(q, k, v, q), unit="FLOP/byte")


def _calls(
    functions: Mapping[str, Attention | str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor] | str]:
    return {
        name: function if isinstance(function, str) else partial(function, q, k, v, FOLDED_SCALE)
        for name, function in functions.items()
    }


def _errors(
    calls: Mapping[str, Callable[[], torch.Tensor] | str], times: Mapping[str, Timing], expected: torch.Tensor
) -> dict[str, Timing]:
    errors: dict[str, Timing] = {}
    for name, call in calls.items():
        time = times[name]
        errors[name] = time if isinstance(time, str) or isinstance(call, str) else _error(call(), expected)
    return errors


def _error(o_BNHD: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(sample(o_BNHD), expected)


def _failing(name: str, heads: Iterable[int], ceilings: Ceilings) -> Iterator[Row]:
    gain = torch.ones(NUM_HEADS)
    gain[list(heads)] = _FAILING_GAIN
    q, k, v = inputs(2, MAIN_LENGTH, gain)

    def without_plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        with patch.object(module, "_LOG2_LIMIT", _NO_LIMIT):
            return attention(q, k, v, scale)

    others = {other: peers()[other] for other in (FLASH_ATTENTION_4, CUDNN)}
    calls = _calls({OURS: attention, f"{OURS} without the plan's limit": without_plan, **others}, q, k, v)
    times = medians(calls)
    yield from _rows(name, times, forward_flops(2, MAIN_LENGTH), ceilings)
    yield measured(name, "relative error", _errors(calls, times, exact_sample(q, k, v, FOLDED_SCALE)), "")
    num_tiles = 2 * NUM_HEADS * -(-MAIN_LENGTH // 256)
    shares: dict[str, Timing] = {
        provider: 100 * _second_pass_tiles(call) / num_tiles
        for provider, call in calls.items()
        if provider.startswith(OURS) and not isinstance(call, str)
    }
    yield measured(name, "tiles in the second pass", shares, "%")


def _second_pass_tiles(call: Callable[[], torch.Tensor]) -> int:
    kept: list[torch.Tensor] = []
    zeros = torch.zeros

    def keep(*arguments: int, **options: object) -> torch.Tensor:
        kept.append(zeros(*arguments, **options))
        return kept[-1]

    with patch.object(module.torch, "zeros", keep):
        call()
    return int(kept[0][1])


def _with_prologue(name: str, batch: int, ceilings: Ceilings) -> Iterator[Row]:
    q, k, v, *affine = _raw_inputs(batch, 1.0)
    compiled = torch.compile(qk_norm_rope_reference, dynamic=False)

    def ours() -> torch.Tensor:
        return attention(*qk_norm_rope(q, k, *affine, q_scale=folded_query_scale(HEAD_DIM)), v, FOLDED_SCALE)

    def theirs(function: Attention | str) -> Callable[[], torch.Tensor] | str:
        if isinstance(function, str):
            return function
        return lambda: function(*compiled(q, k, *affine, q_scale=1.0), v, HEAD_DIM**-0.5)

    others = {f"torch.compile + {other}": theirs(peers()[other]) for other in (FLASH_ATTENTION_4, CUDNN)}
    flops = forward_flops(batch, MAIN_LENGTH)
    yield measured(name, "time", medians({OURS: ours, **others}), "ms", flops / ceilings.matmul / 1e9)


def _raw_inputs(batch: int, gain: float) -> list[torch.Tensor]:
    """Return q, k and v as the projections make them, LayerNorm's weights and biases, and the rotary tables."""
    q, k, v = (torch.randn(batch, MAIN_LENGTH, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(3))
    weights = [(gain * (1 + 0.1 * torch.randn(HEAD_DIM, device="cuda"))).bfloat16() for _ in range(2)]
    biases = [(0.1 * gain * torch.randn(HEAD_DIM, device="cuda")).bfloat16() for _ in range(2)]
    cos, sin = rotary_tables(LATENT_FRAMES, *grid(*MAIN_SIZE), device="cuda")
    assert len(cos) == MAIN_LENGTH - NUM_TEXT
    return [q, k, v, weights[0], biases[0], weights[1], biases[1], cos, sin]


def _error_with_prologue(name: str, gain: float) -> Iterator[Row]:
    q, k, v, *affine = _raw_inputs(1, gain)
    heads = sorted({h % NUM_HEADS for _, h in SAMPLED_HEADS})
    exact_q, exact_k = qk_norm_rope_reference(
        *(x[:, :, heads].double() for x in (q, k)), *(x.double() for x in affine), q_scale=1.0
    )
    expected = exact_sample(exact_q, exact_k, v[:, :, heads], HEAD_DIM**-0.5)

    def pytorch() -> torch.Tensor:
        # As diffusers and the published model write it: LayerNorm rounds, the rotation rounds, then SDPA.
        (q_weight, q_bias, k_weight, k_bias), (cos, sin) = affine[:4], affine[4:]
        turned = []
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
            x = F.layer_norm(x, [HEAD_DIM], weight, bias, 1e-6)
            video = x[:, NUM_TEXT:].float()
            pairs = video.unflatten(-1, (-1, 2))
            swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
            video = (video * cos[:, None] + swapped * sin[:, None]).to(x.dtype)
            turned.append(torch.cat([x[:, :NUM_TEXT], video], dim=1).transpose(1, 2))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*turned, v.transpose(1, 2)).transpose(1, 2)

    ours = attention(*qk_norm_rope(q, k, *affine, q_scale=folded_query_scale(HEAD_DIM)), v, FOLDED_SCALE)
    yield measured(
        name, "relative error", {OURS: _error(ours, expected), "PyTorch in bfloat16": _error(pytorch(), expected)}, ""
    )


def _backward(name: str, ceilings: Ceilings) -> Iterator[Row]:
    leaves = [x.requires_grad_() for x in inputs(1, MAIN_LENGTH)]
    do_BNHD = torch.randn_like(leaves[0])
    outputs: dict[str, torch.Tensor | str] = {OURS: attention(*leaves, FOLDED_SCALE)}
    for other in (FLASH_ATTENTION_4, CUDNN, FLASH_ATTENTION_2):
        function = peers()[other]
        try:
            outputs[other] = function if isinstance(function, str) else function(*leaves, FOLDED_SCALE)
        except Exception as error:
            outputs[other] = reason(error)
    calls = {
        provider: o if isinstance(o, str) else partial(torch.autograd.grad, o, leaves, do_BNHD, retain_graph=True)
        for provider, o in outputs.items()
    }
    times = medians(calls)
    yield from _rows(name, times, 2.5 * forward_flops(1, MAIN_LENGTH), ceilings)

    # One head's whole score matrix in float64 is 3.5 GB.
    exact = [x[0, :, 0].detach().double().requires_grad_() for x in leaves]
    o_ND = torch.softmax(FOLDED_SCALE * exact[0] @ exact[1].T, dim=-1) @ exact[2]
    expected = torch.autograd.grad(o_ND, exact, do_BNHD[0, :, 0].double())
    del o_ND
    errors: dict[str, Timing] = {}
    for provider, call in calls.items():
        time = times[provider]
        if isinstance(time, str) or isinstance(call, str):
            errors[provider] = time
            continue
        errors[provider] = max(relative_error(g[0, :, 0], e) for g, e in zip(call(), expected, strict=True))
    yield measured(f"{name}, worst of dq, dk and dv", "relative error", errors, "")


if __name__ == "__main__":
    run("attention", measure)
