"""Normed, rotated queries and keys: the reference, the kernels' machine code, and the kernels on a GPU."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from echovideo_kernels import FOLDED_SCALE, attention, folded_query_scale, qk_norm_rope, qk_norm_rope_
from echovideo_kernels.qk_norm_rope import qk_norm_rope_reference
from tests.kernels.comparing import errors_from_float64, random, relative_error, rotary, traced_operators
from tests.kernels.compiling import compile_for_hopper, launched

module = importlib.import_module("echovideo_kernels.qk_norm_rope")

Q_SCALE = folded_query_scale(64)


def inputs(
    batch: int, num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    """q and k as slices of one buffer, and the weights."""
    packed = random(batch, num_tokens, 3 * heads * head_dim, dtype=dtype, device=device)
    q, k, _ = packed.unflatten(-1, (3, heads, head_dim)).unbind(2)
    return [q, k, *(1 + 0.5 * random(4, head_dim, device=device, seed=1)).to(dtype)]


def plain(
    q: torch.Tensor, k: torch.Tensor, q_weight: Any, q_bias: Any, k_weight: Any, k_bias: Any, cos: Any, sin: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one would write it in PyTorch, in the inputs' dtype."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        text, video = x.tensor_split([x.shape[1] - len(cos)], dim=1)
        pairs = video.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return torch.cat([text, (video * cos[:, None] + turned * sin[:, None]).to(x.dtype)], dim=1)

    q = F.layer_norm(q, q.shape[-1:], q_weight, q_bias, 1e-6)
    k = F.layer_norm(k, k.shape[-1:], k_weight, k_bias, 1e-6)
    return rotate(q) * Q_SCALE, rotate(k)


def test_reference_float64_is_layer_norm_then_complex_rotation_of_the_video() -> None:
    q, k, *weights = (tensor.double() for tensor in inputs(2, 9, 3, 16))
    angles = random(6, 8).double()
    tables = [table.repeat_interleave(2, dim=1) for table in (angles.cos(), angles.sin())]
    ours = qk_norm_rope_reference(q, k, *weights, *tables, q_scale=0.3)
    for x, weight, bias, scale, out in ((q, *weights[:2], 0.3, ours[0]), (k, *weights[2:], 1.0, ours[1])):
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * weight + bias
        turned = torch.view_as_complex(normed[:, 3:].unflatten(-1, (8, 2))) * torch.exp(1j * angles)[:, None]
        expected = torch.cat([normed[:, :3], torch.view_as_real(turned).flatten(-2)], dim=1) * scale
        assert relative_error(out, expected) < 1e-14


def test_folded_scale_attention_equals_softmax_of_scaled_products() -> None:
    q, k, *weights = (tensor.double() for tensor in inputs(2, 9, 3, 64))
    tables = [table.double() for table in rotary(6, 64)]
    v = random(2, 9, 3, 64, seed=5).double()
    folded = attention(*qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE), v, FOLDED_SCALE)
    plain_q, plain_k = qk_norm_rope(q, k, *weights, *tables, q_scale=1.0)
    assert relative_error(folded, attention(plain_q, plain_k, v, 64**-0.5)) < 1e-14


def test_reference_float64_passes_gradcheck() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in inputs(1, 4, 2, 8)]
    tables = [table.double() for table in rotary(3, 8)]
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, *tables, q_scale=0.3), tensors)


def test_qk_norm_rope_in_place_on_the_cpu_changes_q_and_k_alone() -> None:
    packed, weights, tables = random(2, 9, 3, 3, 16), random(4, 16, seed=1), rotary(6, 16)
    before = packed.clone()
    q, k, v = packed.unbind(2)
    expected = qk_norm_rope(q, k, *weights, *tables, q_scale=0.3)
    assert torch.equal(packed, before)
    assert all(a is b for a, b in zip(qk_norm_rope_(q, k, *weights, *tables, q_scale=0.3), (q, k), strict=True))
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(v, before[:, :, 2])


@pytest.mark.parametrize(
    ("which", "shape", "dtype", "message"),
    [
        (1, (2, 9, 3, 8), torch.float32, r"\(2, 9, 3, 16\) torch.float32 and \(2, 9, 3, 8\)"),
        (1, (2, 9, 3, 16), torch.float16, "torch.float32 and .* torch.float16"),
        (2, (8,), torch.float32, r"must be \(16,\)"),
        (6, (6, 8), torch.float32, r"at most 9, 16\), not \(6, 8\)"),
        (7, (5, 16), torch.float32, r"\(6, 16\) and \(5, 16\)"),
        (7, (6, 16), torch.bfloat16, "float32, not torch.float32 and torch.bfloat16"),
    ],
    ids=["k-shape", "k-dtype", "weight", "table-width", "table-lengths", "table-dtype"],
)
def test_qk_norm_rope_inputs_that_do_not_fit_are_refused(
    which: int, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    tensors = [*inputs(2, 9, 3, 16), *rotary(6, 16)]
    tensors[which] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*tensors, q_scale=1.0)


def test_qk_norm_rope_more_table_rows_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 9, 16\), not \(10, 16\)"):
        qk_norm_rope(*inputs(2, 9, 3, 16), *rotary(10, 16), q_scale=1.0)


@pytest.mark.parametrize("norm_rope", [qk_norm_rope, qk_norm_rope_])
def test_qk_norm_rope_compiled_whole_for_hopper_is_one_operator(norm_rope: Callable[..., Any]) -> None:
    tensors = [*inputs(2, 9, 3, 64, torch.bfloat16), *rotary(6, 64)]
    assert traced_operators(lambda *x: norm_rope(*x, q_scale=0.3), tensors) == [
        f"echovideo.{norm_rope.__name__}.default"
    ]


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("kernel", "ceiling"), [("_forward_kernel", 128), ("_backward_kernel", 224)])
def test_kernel_production_shape_compiles_for_hopper_within_its_registers(
    kernel: str, ceiling: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    q, k = on_meta(2, 20896, 48, 64), on_meta(2, 20896, 48, 64)
    weights, tables = [on_meta(64)] * 4, [on_meta(20670, 64, dtype=torch.float32)] * 2

    def launch() -> None:
        if kernel == "_forward_kernel":
            module._launch_forward(q, k, *weights, *tables, Q_SCALE, 1e-6, q, k)
        else:
            module._launch_backward(k, q, weights[0], *tables, Q_SCALE, 1e-6)

    compiled = compile_for_hopper(
        getattr(module, kernel), *launched(monkeypatch, module, kernel, launch), folder=tmp_path
    )
    assert compiled.registers <= ceiling
    assert compiled.stack == 0
    assert compiled.spills == 0


SHAPES = [(1, 1, 1, 64, 1), (2, 131, 3, 64, 90), (1, 1000, 48, 64, 774), (3, 57, 5, 128, 0), (2, 33, 7, 16, 33)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm_rope_kernel_any_shape_errs_at_most_half_more_than_pytorch(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    *sizes, num_video = shape
    batch, num_tokens, heads, head_dim = sizes
    tensors, tables = inputs(*sizes, dtype, "cuda"), rotary(num_video, head_dim, "cuda")
    grads = list(random(2, batch, num_tokens, heads, head_dim, dtype=dtype, device="cuda", seed=2))

    def errors(function: Callable[..., Any]) -> list[float]:
        return errors_from_float64(lambda *x: function(*x, *tables), lambda *x: plain(*x, *tables), tensors, grads)

    ours, theirs = errors(lambda *x: qk_norm_rope(*x, q_scale=Q_SCALE)), errors(plain)
    assert all(a <= 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.gpu
def test_qk_norm_rope_kernel_float32_matches_float64() -> None:
    tensors, tables = inputs(2, 131, 3, 64, device="cuda"), rotary(90, 64, "cuda")
    grads = list(random(2, 2, 131, 3, 64, device="cuda", seed=2))
    errors = errors_from_float64(
        lambda *x: qk_norm_rope(*x, *tables, q_scale=Q_SCALE), lambda *x: plain(*x, *tables), tensors, grads
    )
    assert max(errors) < 1e-6


@pytest.mark.gpu
def test_qk_norm_rope_kernel_in_place_equals_functional_and_changes_q_and_k_alone() -> None:
    packed = random(2, 333, 3, 48, 64, dtype=torch.bfloat16, device="cuda")
    weights = random(4, 64, dtype=torch.bfloat16, device="cuda", seed=1)
    before, tables = packed.clone(), rotary(300, 64, "cuda")
    q, k, v = packed.unbind(2)
    expected = qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    assert torch.equal(packed, before)
    qk_norm_rope_(q, k, *weights, *tables, q_scale=Q_SCALE)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(v, before[:, :, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_qk_norm_rope_kernel_poisoned_row_stays_alone_and_all_else_is_written(poison: float) -> None:
    q, k, *weights = inputs(2, 77, 5, 64, torch.bfloat16, "cuda")
    tables = rotary(50, 64, "cuda")
    clean = qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    q[1, 40, 3, 7] = poison
    outs = [torch.full_like(out, math.nan) for out in clean]
    module._launch_forward(q, k, *weights, *tables, Q_SCALE, 1e-6, *outs)
    assert outs[0][1, 40, 3].isnan().all()
    outs[0][1, 40, 3] = clean[0][1, 40, 3]
    assert torch.equal(outs[0], clean[0])
    assert torch.equal(outs[1], clean[1])


@pytest.mark.gpu
def test_qk_norm_rope_kernel_gradients_repeat_bitwise() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(2, 2000, 8, 64, torch.bfloat16, "cuda")]
    tables = rotary(1800, 64, "cuda")

    def gradients() -> tuple[torch.Tensor, ...]:
        q, k = qk_norm_rope(*tensors, *tables, q_scale=Q_SCALE)
        return torch.autograd.grad((q * k).float().sum(), tensors)

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(50) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.gpu
def test_qk_norm_rope_kernel_rows_beyond_32_bit_offsets_match_their_copies() -> None:
    stride = 2**30 + 64
    q = torch.empty(2 * stride + 128, dtype=torch.bfloat16, device="cuda")
    q = q.as_strided((1, 3, 2, 64), (3 * stride, stride, 64, 1))
    q.copy_(random(1, 3, 2, 64, device="cuda"))
    weights, tables = random(4, 64, dtype=torch.bfloat16, device="cuda", seed=1), rotary(2, 64, "cuda")
    expected = qk_norm_rope(q.contiguous(), q.contiguous(), *weights, *tables, q_scale=Q_SCALE)
    assert torch.equal(qk_norm_rope(q, q, *weights, *tables, q_scale=Q_SCALE)[0], expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("norm_rope", [qk_norm_rope, qk_norm_rope_])
def test_qk_norm_rope_kernel_compiled_whole_matches_eager_bitwise(norm_rope: Callable[..., Any]) -> None:
    weights = random(4, 64, dtype=torch.bfloat16, device="cuda", seed=1)
    tables = rotary(90, 64, "cuda")

    def call(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = packed.clone().unbind(2)
        return *norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE), v

    packed = random(2, 131, 3, 3, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True)(packed)
        assert all(torch.equal(a, b) for a, b in zip(compiled, call(packed), strict=True))


@pytest.mark.gpu
def test_qk_norm_rope_kernel_compiled_gradients_match_eager() -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(2, 131, 3, 64, torch.bfloat16, "cuda")]
    tables = rotary(90, 64, "cuda")

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        q, k = qk_norm_rope(*tensors, *tables, q_scale=Q_SCALE)
        return (q.float() * k.float()).sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    eager = torch.autograd.grad(loss(*tensors), tensors)
    assert all(relative_error(a, b) < 4e-3 for a, b in zip(compiled, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("norm_rope", [qk_norm_rope, qk_norm_rope_])
def test_qk_norm_rope_kernel_graph_replayed_on_new_inputs_matches_eager_bitwise(norm_rope: Callable[..., Any]) -> None:
    q, k, *weights = inputs(2, 131, 3, 64, torch.bfloat16, "cuda")
    tables = rotary(90, 64, "cuda")
    qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    new_q, new_k = random(2, 2, 131, 3, 64, dtype=torch.bfloat16, device="cuda", seed=7)
    q.copy_(new_q)
    k.copy_(new_k)
    graph.replay()
    expected = qk_norm_rope(new_q, new_k, *weights, *tables, q_scale=Q_SCALE)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
