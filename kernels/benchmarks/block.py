"""One whole transformer block, forward, beside diffusers' block with the same weights; and its linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import forward_flops
from benchmarks.common import OURS, Ceilings, Row, measured, medians, num_bytes, rates, relative_error, run
from benchmarks.peers import CONFIG, HEAD_DIM, LATENT_FRAMES, MAIN_SIZE, NUM_HEADS, NUM_TEXT, grid, num_tokens
from echovideo.model.rotary import rotary_tables
from echovideo.model.transformer import ModulatedNorm, TransformerBlock
from echovideo_kernels import (
    FOLDED_SCALE,
    attention,
    folded_query_scale,
    gelu_float8,
    linear_float8,
    linear_gelu,
    modulated_norm_float8_,
    qk_norm_rope_,
    quantize_rows,
)

LENGTH = num_tokens(*MAIN_SIZE)
NAME = f"block, {MAIN_SIZE[1]}x{MAIN_SIZE[0]}"
DIFFUSERS = "diffusers, compiled, cuDNN"

Tables = tuple[torch.Tensor, torch.Tensor]
Stream = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The residual stream between blocks: x, a branch and its gate, whose sum x + gate * branch is still to be made."""


class Float8Block(nn.Module):
    """The transformer block with its six linear layers in row-wise FP8, put together from the operators."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block
        attention_ = block.attn1
        self.to_q, self.to_k, self.to_v = (
            _Float8Linear(x) for x in (attention_.to_q, attention_.to_k, attention_.to_v)
        )
        self.to_out = _Float8Linear(attention_.to_out[0])
        self.up, self.down = _Float8Linear(block.ff.net[0].proj), _Float8Linear(block.ff.net[2])

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, time_BD: torch.Tensor, rotary: Tables
    ) -> Stream:
        norm_q, norm_k = self.block.attn1.norm_q, self.block.attn1.norm_k
        x, y, y_scale, gate = _norm_float8(self.block.norm1, x, branch, gate, time_BD)
        q, k, v = (linear(y, y_scale).unflatten(-1, (NUM_HEADS, -1)) for linear in (self.to_q, self.to_k, self.to_v))
        affine = (norm_q.weight, norm_q.bias, norm_k.weight, norm_k.bias)
        q, k = qk_norm_rope_(q, k, *affine, *rotary, q_scale=folded_query_scale(HEAD_DIM), eps=norm_q.eps)
        branch = self.to_out(*quantize_rows(attention(q, k, v, FOLDED_SCALE).flatten(2)))
        x, y, y_scale, gate = _norm_float8(self.block.norm2, x, branch, gate, time_BD)
        return x, self.down(*gelu_float8(self.up(y, y_scale))), gate


class _Float8Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = quantize_rows(linear.weight.detach())
        self.bias = linear.bias.detach()

    def forward(self, x: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
        return linear_float8(x, x_scale, self.weight, self.scale, self.bias)


def _norm_float8(
    norm: ModulatedNorm, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, time_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shift, scale, next_gate = norm.linear(F.silu(time_BD)).unflatten(-1, (2, 3, -1)).unbind(2)
    affine = (norm.norm.weight, norm.norm.bias)
    x, y, y_scale = modulated_norm_float8_(x, shift, scale, *affine, branch, gate, num_text=NUM_TEXT, eps=norm.norm.eps)
    return x, y, y_scale, next_gate


def measure(ceilings: Ceilings) -> Iterator[Row]:
    """Measure the block at the main size, batch 2 and 1, in bfloat16 and with FP8 linear layers."""
    with torch.no_grad():
        block = _block()
        for batch in (2, 1):
            yield from _blocks(block, batch, ceilings)
        yield from _linears(ceilings)


def _block() -> TransformerBlock:
    block = TransformerBlock(CONFIG).cuda()
    for norm in (block.norm1, block.norm2):
        # Trained shifts, scales and gates are of this order; PyTorch's initial ones all but switch the branches off.
        nn.init.normal_(norm.linear.bias, std=0.5)
    return block.bfloat16()


def _diffusers_block(block: TransformerBlock) -> CogVideoXBlock:
    theirs = CogVideoXBlock(
        dim=CONFIG.inner_dim,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        time_embed_dim=CONFIG.time_embed_dim,
        attention_bias=CONFIG.attention_bias,
        norm_eps=CONFIG.norm_eps,
    )
    theirs.load_state_dict(block.state_dict())
    return theirs.to("cuda", torch.bfloat16).eval()


def _blocks(block: TransformerBlock, batch: int, ceilings: Ceilings) -> Iterator[Row]:
    dim = CONFIG.inner_dim
    x, branch = (torch.randn(batch, LENGTH, dim, device="cuda").bfloat16() for _ in range(2))
    gate = (0.5 * torch.randn(batch, 2, dim, device="cuda")).bfloat16()
    time_BD = torch.randn(batch, CONFIG.time_embed_dim, device="cuda").bfloat16()
    rotary = rotary_tables(LATENT_FRAMES, *grid(*MAIN_SIZE), device="cuda")
    theirs = _diffusers_block(block)
    joint = _joined((x, branch, gate))
    video, text = joint[:, NUM_TEXT:].contiguous(), joint[:, :NUM_TEXT].contiguous()
    compiled, compiled_theirs = torch.compile(block, dynamic=False), torch.compile(theirs, dynamic=False)
    compiled_float8 = torch.compile(Float8Block(block), dynamic=False)

    def diffusers(module: CogVideoXBlock) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out: tuple[torch.Tensor, torch.Tensor] = module(video, text, time_BD, rotary)
            return out

        return call

    # Errors are those of what the block adds: the residual that it is added to would hide them.
    wide = copy.deepcopy(block).float()
    exact = _joined(
        wide(joint.float(), torch.zeros_like(joint, dtype=torch.float32), gate.float(), time_BD.float(), rotary)
    )
    expected = exact - joint.float()
    del wide, exact
    out_video, out_text = diffusers(compiled_theirs)()
    outputs = {
        OURS: _joined(compiled(x.clone(), branch, gate, time_BD, rotary)),
        f"{OURS} with FP8": _joined(compiled_float8(x.clone(), branch, gate, time_BD, rotary)),
        DIFFUSERS: torch.cat([out_text, out_video], dim=1),
    }
    errors = {provider: relative_error(out.float() - joint.float(), expected) for provider, out in outputs.items()}
    assert errors[OURS] <= 1.5 * errors[DIFFUSERS], errors
    yield measured(f"{NAME}, batch {batch}", "relative error of what the block adds", errors, "")
    del outputs, expected

    # In place, x grows by the gated branches at every run; LayerNorm makes the same of it.
    times = medians(
        {
            OURS: lambda: compiled(x, branch, gate, time_BD, rotary),
            f"{OURS} with FP8": lambda: compiled_float8(x, branch, gate, time_BD, rotary),
            f"{OURS}, eager": lambda: block(x, branch, gate, time_BD, rotary),
            DIFFUSERS: diffusers(compiled_theirs),
            "diffusers, eager, cuDNN": diffusers(theirs),
        }
    )
    attention_flops, linear_flops = forward_flops(batch, LENGTH), 24.0 * batch * LENGTH * dim**2
    attention_time = attention_flops / ceilings.matmul / 1e9
    float8 = times.pop(f"{OURS} with FP8")
    yield measured(f"{NAME}, batch {batch}", "time", times, "ms", attention_time + linear_flops / ceilings.matmul / 1e9)
    yield measured(
        f"{NAME}, FP8 linear layers, batch {batch}",
        "time",
        {**times, OURS: float8, f"{OURS} in bfloat16": times[OURS]},
        "ms",
        attention_time + linear_flops / ceilings.matmul_float8 / 1e9,
    )


def _joined(stream: Stream) -> torch.Tensor:
    """Return x + gate * branch in float32, rounded to x's dtype as the next norm would."""
    x, branch, gate = stream
    video, text = gate.float()[:, :, None].unbind(1)
    per_token = torch.cat([text.expand(-1, NUM_TEXT, -1), video.expand(-1, x.shape[1] - NUM_TEXT, -1)], dim=1)
    return (x.float() + per_token * branch.float()).to(x.dtype)


def _linears(ceilings: Ceilings) -> Iterator[Row]:
    dim = CONFIG.inner_dim
    linear = nn.Linear(dim, 4 * dim, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, LENGTH, dim, device="cuda").bfloat16()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(linear(x), approximate="tanh")

    compiled = torch.compile(plain, dynamic=False)
    flops = 2.0 * x.numel() * 4 * dim
    name = f"linear_gelu, {dim} to {4 * dim}"
    times = medians(
        {
            OURS: lambda: linear_gelu(x, linear.weight, linear.bias),
            "torch.compile": lambda: compiled(x),
            "eager": lambda: plain(x),
        }
    )
    yield measured(name, "throughput", rates(times, flops), "TFLOP/s", ceilings.matmul)
    out = linear(x)
    yield Row(name=name, metric="intensity", value=flops / num_bytes(x, linear.weight, out), unit="FLOP/byte")

    quantised, float8 = quantize_rows(x), _Float8Linear(linear)
    name = f"linear_float8, {dim} to {4 * dim}"
    times = medians({OURS: lambda: float8(*quantised), "bfloat16": lambda: linear(x)})
    yield measured(name, "throughput", rates(times, flops), "TFLOP/s", ceilings.matmul_float8)
    moved = num_bytes(*quantised, float8.weight, out)
    yield Row(name=name, metric="intensity", value=flops / moved, unit="FLOP/byte")


if __name__ == "__main__":
    run("block", measure)
