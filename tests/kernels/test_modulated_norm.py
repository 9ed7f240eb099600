"""The modulated norm: the reference, the kernels' machine code, and the kernels on a GPU."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from echovideo_kernels import modulated_norm, modulated_norm_, modulated_norm_float8_
from echovideo_kernels.linear import quantize_rows_reference
from echovideo_kernels.modulated_norm import modulated_norm_reference
from tests.kernels.comparing import errors_from_float64, float8_error, random, relative_error, traced_operators
from tests.kernels.compiling import compile_for_hopper, launched

module = importlib.import_module("echovideo_kernels.modulated_norm")

EPS = 1e-5


def inputs(
    batch: int,
    num_tokens: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    branch: bool = True,
) -> list[torch.Tensor]:
    """x, modulations as slices of one linear layer's output, weights, and the branch with its gate."""
    x, branch_BND = random(2, batch, num_tokens, dim, dtype=dtype, device=device)
    shift, scale, gate = random(batch, 6 * dim, dtype=dtype, device=device, seed=1).view(batch, 2, 3, dim).unbind(2)
    weight, bias = random(2, dim, dtype=dtype, device=device, seed=2)
    return [x, shift, scale, weight, bias, *([branch_BND, gate] if branch else [])]


def plain(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    *,
    num_text: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one would write it in PyTorch, in the inputs' dtype."""
    residuals, outs = [], []
    for tokens, stream in ((slice(None, num_text), 1), (slice(num_text, None), 0)):
        part = x[:, tokens]
        if branch is not None and gate is not None:
            part = part + gate[:, stream, None] * branch[:, tokens]
        normed = F.layer_norm(part, part.shape[-1:], weight, bias, eps)
        residuals.append(part)
        outs.append(normed * (1 + scale[:, stream, None]) + shift[:, stream, None])
    return torch.cat(residuals, dim=1), torch.cat(outs, dim=1)


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_reference_float64_is_the_formula_for_each_stream(branch: bool) -> None:
    tensors = [tensor.double() for tensor in inputs(2, 9, 16, branch=branch)]
    ours = modulated_norm_reference(*tensors, num_text=4, eps=EPS)
    expected = plain(*tensors, num_text=4, eps=EPS)
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_reference_float64_passes_gradcheck(branch: bool) -> None:
    tensors = [tensor.double().requires_grad_() for tensor in inputs(2, 3, 8, branch=branch)]
    assert torch.autograd.gradcheck(lambda *x: modulated_norm(*x, num_text=1, eps=EPS), tensors)


def test_modulated_norm_in_place_on_the_cpu_changes_x_alone() -> None:
    x, *others = inputs(2, 9, 16)
    before, kept = x.clone(), [tensor.clone() for tensor in others]
    residual, y = modulated_norm(x, *others, num_text=4, eps=EPS)
    assert torch.equal(x, before)
    in_place = modulated_norm_(x, *others, num_text=4, eps=EPS)
    assert in_place[0] is x
    assert torch.equal(x, residual)
    assert torch.equal(in_place[1], y)
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))


def test_modulated_norm_float8_on_the_cpu_is_the_rows_of_y_quantised() -> None:
    x, *others = inputs(2, 9, 16)
    residual, y = modulated_norm(x, *others, num_text=4, eps=EPS)
    x_out, y_float8, y_scale = modulated_norm_float8_(x, *others, num_text=4, eps=EPS)
    assert x_out is x
    assert torch.equal(x, residual)
    expected, scale = quantize_rows_reference(y)
    assert torch.equal(y_float8.float(), expected.float())
    assert torch.equal(y_scale, scale)


@pytest.mark.parametrize(
    ("which", "shape", "dtype", "message"),
    [
        (0, (2, 9), torch.float32, r"with 4 text tokens among its N, not \(2, 9\)"),
        (0, (2, 3, 16), torch.float32, r"with 4 text tokens among its N, not \(2, 3, 16\)"),
        (1, (2, 16), torch.float32, r"shift must be \(2, 2, 16\), not \(2, 16\)"),
        (2, (1, 2, 16), torch.float32, r"scale must be \(2, 2, 16\), not \(1, 2, 16\)"),
        (3, (8,), torch.float32, r"weight and bias must be \(16,\), not \(8,\)"),
        (5, (2, 8, 16), torch.float32, r"branch must be \(2, 9, 16\) torch.float32.*not \(2, 8, 16\)"),
        (5, (2, 9, 16), torch.float16, "not .* torch.float16"),
        (6, (2, 3, 16), torch.float32, r"gate must be \(2, 2, 16\), not \(2, 3, 16\)"),
    ],
)
def test_modulated_norm_inputs_that_do_not_fit_are_refused(
    which: int, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    tensors = inputs(2, 9, 16)
    tensors[which] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        modulated_norm(*tensors, num_text=4, eps=EPS)


def test_modulated_norm_branch_without_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="come together"):
        modulated_norm(*inputs(2, 9, 16)[:6], num_text=4, eps=EPS)


@pytest.mark.parametrize("norm", [modulated_norm, modulated_norm_, modulated_norm_float8_])
def test_modulated_norm_compiled_whole_for_hopper_is_one_operator(norm: Callable[..., Any]) -> None:
    tensors = inputs(2, 9, 64, torch.bfloat16)
    operators = traced_operators(lambda *x: norm(*x, num_text=4, eps=EPS), tensors)
    assert operators == [f"echovideo.{norm.__name__}.default"]


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("case", "dim", "ceiling"),
    [
        ("forward", 3072, 64),
        ("no-branch", 3072, 64),
        ("float8", 3072, 64),
        ("backward", 3072, 128),
        ("forward", 256, 64),
        ("backward", 256, 128),
    ],
)
def test_kernel_of_both_models_widths_compiles_for_hopper_within_its_registers(
    case: str, dim: int, ceiling: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, weight = on_meta(2, 20896, dim), on_meta(dim)
    shift, scale, gate = on_meta(2, 2, 3, dim).unbind(2)
    branch = (None, None) if case == "no-branch" else (x, gate)
    y_scale = on_meta(2, 20896, dtype=torch.float32) if case == "float8" else None
    y = x.to(torch.float8_e4m3fn) if case == "float8" else x
    kernel = "_backward_kernel" if case == "backward" else "_forward_kernel"

    def launch() -> None:
        if case == "backward":
            module._launch_backward(x, scale, weight, *branch, 226, EPS, x, x)
        else:
            module._launch_forward(x, shift, scale, weight, weight, *branch, 226, EPS, x, y, y_scale)

    compiled = compile_for_hopper(
        getattr(module, kernel), *launched(monkeypatch, module, kernel, launch), folder=tmp_path
    )
    assert compiled.registers <= ceiling
    assert compiled.stack == 0
    assert compiled.spills == 0


SHAPES = [(1, 1, 3072, 1), (2, 131, 3072, 41), (1, 999, 256, 0), (3, 57, 4096, 57), (2, 33, 80, 10)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_norm_kernel_any_shape_errs_at_most_half_more_than_pytorch(
    shape: tuple[int, int, int, int], branch: bool, dtype: torch.dtype
) -> None:
    *sizes, num_text = shape
    tensors = inputs(*sizes, dtype, "cuda", branch)
    grads = list(random(2, *sizes, dtype=dtype, device="cuda", seed=4))

    def errors(function: Callable[..., Any]) -> list[float]:
        return errors_from_float64(
            lambda *x: function(*x, num_text=num_text, eps=EPS),
            lambda *x: plain(*x, num_text=num_text, eps=EPS),
            tensors,
            grads,
        )

    ours, theirs = errors(modulated_norm), errors(plain)
    assert all(a <= 1.5 * b + 1e-12 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.gpu
def test_modulated_norm_kernel_float32_matches_float64() -> None:
    errors = errors_from_float64(
        lambda *x: modulated_norm(*x, num_text=41, eps=EPS),
        lambda *x: plain(*x, num_text=41, eps=EPS),
        inputs(2, 131, 3072, device="cuda"),
        list(random(2, 2, 131, 3072, device="cuda", seed=4)),
    )
    assert max(errors) < 1e-6


@pytest.mark.gpu
def test_modulated_norm_kernel_in_place_equals_functional_and_changes_x_alone() -> None:
    wide = random(2, 333, 3 * 3072, dtype=torch.bfloat16, device="cuda")
    before = wide.clone()
    x, others = wide[..., 3072:6144], inputs(2, 333, 3072, torch.bfloat16, "cuda")[1:]
    kept = [tensor.clone() for tensor in others]
    residual, y = modulated_norm(x, *others, num_text=226, eps=EPS)
    assert torch.equal(wide, before)
    assert torch.equal(modulated_norm_(x, *others, num_text=226, eps=EPS)[1], y)
    assert torch.equal(x, residual)
    assert torch.equal(wide[..., :3072], before[..., :3072])
    assert torch.equal(wide[..., 6144:], before[..., 6144:])
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))


@pytest.mark.gpu
def test_modulated_norm_float8_kernel_gives_the_nearest_of_each_rows_scale() -> None:
    x, *others = inputs(2, 333, 3072, torch.bfloat16, "cuda")
    residual, _ = modulated_norm(x, *others, num_text=226, eps=EPS)
    _, y = plain(residual.double(), *(tensor.double() for tensor in others[:4]), num_text=226, eps=EPS)
    _, y_float8, y_scale = modulated_norm_float8_(x, *others, num_text=226, eps=EPS)
    assert torch.equal(x, residual)
    assert relative_error(y_scale, y.abs().amax(-1) / 448) < 1e-6
    assert float8_error(y_float8, y_scale, y) < 0.501


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 5], ids=["x", "branch"])
def test_modulated_norm_kernel_poisoned_row_stays_alone_and_all_else_is_written(which: int, poison: float) -> None:
    tensors = inputs(2, 333, 3072, torch.bfloat16, "cuda")
    clean = modulated_norm(*tensors, num_text=226, eps=EPS)
    tensors[which][1, 300, 3] = poison
    outs = [torch.full_like(out, math.nan) for out in clean]
    module._launch_forward(*tensors, 226, EPS, *outs)
    assert outs[1][1, 300].isnan().all()
    _, y_float8, _ = modulated_norm_float8_(*(tensor.clone() for tensor in tensors), num_text=226, eps=EPS)
    assert y_float8[1, 300].float().isnan().all()
    for out, like in zip(outs, clean, strict=True):
        out[1, 300] = like[1, 300]
        assert torch.equal(out, like)
    y_float8[1, 300] = 0
    assert y_float8.float().isfinite().all()


@pytest.mark.gpu
def test_modulated_norm_kernel_gradients_repeat_bitwise() -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(2, 2000, 3072, torch.bfloat16, "cuda")]

    def gradients() -> tuple[torch.Tensor, ...]:
        residual, y = modulated_norm(*tensors, num_text=226, eps=EPS)
        return torch.autograd.grad((residual * y).float().sum(), tensors)

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(50) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.gpu
def test_modulated_norm_kernel_rows_beyond_32_bit_offsets_match_their_copies() -> None:
    stride = 2**30 + 64
    _, *others = inputs(1, 3, 3072, torch.bfloat16, "cuda")
    x = torch.empty(2 * stride + 3072, dtype=torch.bfloat16, device="cuda")
    x = x.as_strided((1, 3, 3072), (3 * stride, stride, 1))
    x.copy_(random(1, 3, 3072, device="cuda"))
    expected = modulated_norm(x.contiguous(), *others, num_text=1, eps=EPS)
    ours = modulated_norm_(x, *others, num_text=1, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [modulated_norm, modulated_norm_, modulated_norm_float8_])
def test_modulated_norm_kernel_compiled_whole_matches_eager_bitwise(norm: Callable[..., Any]) -> None:
    tensors = inputs(2, 333, 3072, torch.bfloat16, "cuda")

    def call(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        return [out.float() for out in norm(x.clone(), *others, num_text=226, eps=EPS)]

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True)(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(compiled, call(*tensors), strict=True))


@pytest.mark.gpu
def test_modulated_norm_kernel_compiled_gradients_match_eager() -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(2, 333, 3072, torch.bfloat16, "cuda")]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        residual, y = modulated_norm(*tensors, num_text=226, eps=EPS)
        return (residual.float() * y.float()).sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    eager = torch.autograd.grad(loss(*tensors), tensors)
    assert all(relative_error(a, b) < 4e-3 for a, b in zip(compiled, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [modulated_norm, modulated_norm_])
def test_modulated_norm_kernel_graph_replayed_on_new_inputs_matches_eager_bitwise(norm: Callable[..., Any]) -> None:
    x, *others = inputs(2, 333, 3072, torch.bfloat16, "cuda")
    modulated_norm(x, *others, num_text=226, eps=EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = norm(x, *others, num_text=226, eps=EPS)
    new = random(2, 333, 3072, dtype=torch.bfloat16, device="cuda", seed=7)
    x.copy_(new)
    graph.replay()
    expected = modulated_norm(new, *others, num_text=226, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
