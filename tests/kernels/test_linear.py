"""Linear layers, with GELU or in FP8 too: the references, the kernel's machine code, and all of it on a GPU."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from echovideo_kernels import column_sum, gelu_float8, linear, linear_float8, linear_gelu, quantize_rows
from echovideo_kernels.linear import linear_float8_reference, linear_gelu_reference
from tests.kernels.comparing import (
    errors_from_float64,
    float8_error,
    random,
    relative_error,
    traced_operators,
)
from tests.kernels.compiling import compile_for_hopper, launched

module = importlib.import_module("echovideo_kernels.linear")


def inputs(
    *rows: int, width: int, outputs: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    """x, weight and bias of a linear layer whose outputs are about 1."""
    x = random(*rows, width, dtype=dtype, device=device)
    weight = (random(outputs, width, device=device, seed=1) / width**0.5).to(dtype)
    return [x, weight, random(outputs, dtype=dtype, device=device, seed=2)]


@pytest.mark.parametrize("trained", ["x, weight and bias", "weight and bias", "x"])
def test_linear_on_the_cpu_is_pytorchs_with_gradients_to_the_bit(trained: str) -> None:
    tensors = inputs(2, 5, width=16, outputs=24)
    for tensor, name in zip(tensors, ("x", "weight", "bias"), strict=True):
        tensor.requires_grad_(name in trained)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    dy = random(2, 5, 24, seed=3)
    ours, theirs = linear(*tensors), F.linear(*tensors)
    assert torch.equal(ours, theirs)
    gradients = (torch.autograd.grad(out, leaves, dy) for out in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_linear_gelu_on_the_cpu_is_the_tanh_form() -> None:
    x, weight, bias = (tensor.double() for tensor in inputs(2, 5, width=16, outputs=24))
    u = x @ weight.T + bias
    expected = 0.5 * u * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u**3)))
    assert relative_error(linear_gelu(x, weight, bias), expected) < 1e-14
    assert relative_error(linear_gelu_reference(x, weight, bias), expected) < 1e-14


def test_linear_gelu_operator_keeps_the_rules_of_operators() -> None:
    torch.library.opcheck(module._linear_gelu, tuple(inputs(2, 3, width=4, outputs=5)))


@pytest.mark.parametrize(
    ("which", "shape", "dtype", "message"),
    [
        (0, (3, 5), torch.float32, r"not \(3, 5\), \(24, 16\) and \(24,\)"),
        (2, (16,), torch.float32, r"not \(3, 16\), \(24, 16\) and \(16,\)"),
        (0, (3, 16), torch.bfloat16, "share a dtype, and are torch.bfloat16"),
    ],
)
def test_linear_gelu_inputs_that_do_not_fit_are_refused(
    which: int, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    tensors = inputs(3, width=16, outputs=24)
    tensors[which] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        linear_gelu(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_rows_on_the_cpu_gives_the_nearest_of_each_rows_scale(dtype: torch.dtype) -> None:
    x = 5 * random(2, 7, 80, dtype=dtype)
    x[0, 3] = 0
    for exact, (x_float8, scale) in (
        (x.double(), quantize_rows(x)),
        (F.gelu(x.double(), approximate="tanh"), gelu_float8(x)),
    ):
        assert scale.dtype == torch.float32
        assert relative_error(scale, exact.abs().amax(-1) / 448) < 1e-6
        assert float8_error(x_float8, scale, exact) < 0.5001


def test_linear_float8_on_the_cpu_is_near_the_exact_product() -> None:
    x, weight, bias = inputs(2, 40, width=512, outputs=64)
    out = linear_float8(*quantize_rows(x), *quantize_rows(weight), bias)
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 40, 64)
    assert relative_error(out, F.linear(x, weight, bias)) < 0.04


@pytest.mark.parametrize(
    ("which", "shape", "dtype", "message"),
    [
        (0, (3, 16), torch.bfloat16, "must be float8_e4m3fn, and are torch.bfloat16"),
        (0, (3, 32), torch.float8_e4m3fn, r"not \(3, 32\), \(3,\), \(32, 16\), \(32,\) and \(32,\)"),
        (1, (3, 1), torch.float32, r"not \(3, 16\), \(3, 1\)"),
        (2, (24, 16), torch.float8_e4m3fn, r"\(24, 16\), \(32,\)"),
        (4, (24,), torch.float32, r"\(32,\) and \(24,\)"),
    ],
)
def test_linear_float8_inputs_that_do_not_fit_are_refused(
    which: int, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    x, weight, bias = inputs(3, width=16, outputs=32)
    tensors = [*quantize_rows(x), *quantize_rows(weight), bias]
    tensors[which] = torch.zeros(shape).to(dtype)
    with pytest.raises(ValueError, match=message):
        linear_float8(*tensors)


def test_linear_float8_widths_that_16_does_not_divide_are_refused() -> None:
    x, weight, bias = inputs(3, width=24, outputs=32)
    with pytest.raises(ValueError, match="divisible by 16"):
        linear_float8(*quantize_rows(x), *quantize_rows(weight), bias)


def test_linear_layers_compiled_whole_for_hopper_are_one_operator_each() -> None:
    tensors = inputs(2, 9, width=64, outputs=128, dtype=torch.bfloat16)
    assert traced_operators(linear_gelu, tensors) == ["echovideo.linear_gelu.default"]
    assert traced_operators(gelu_float8, tensors[:1]) == ["echovideo.quantize_rows.default"]
    assert traced_operators(quantize_rows, tensors[:1]) == ["echovideo.quantize_rows.default"]


@pytest.mark.parametrize(("width", "gelu", "ceiling"), [(12288, True, 64), (3072, False, 64)])
def test_kernel_production_shape_compiles_for_hopper_within_its_registers(
    width: int, gelu: bool, ceiling: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.empty(2, 20896, width, dtype=torch.bfloat16, device="meta")
    launch = launched(monkeypatch, module, "_quantize_kernel", lambda: module._launch_quantize(x, gelu))
    compiled = compile_for_hopper(module._quantize_kernel, *launch, folder=tmp_path)
    assert compiled.registers <= ceiling
    assert compiled.stack == 0
    assert compiled.spills == 0


@pytest.mark.parametrize("width", [256, 12288])
def test_column_sum_kernel_compiles_for_hopper_within_its_registers(
    width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.empty(20896, width, dtype=torch.bfloat16, device="meta")
    launch = launched(monkeypatch, module, "_column_sum_kernel", lambda: module._launch_column_sum(x))
    compiled = compile_for_hopper(module._column_sum_kernel, *launch, folder=tmp_path)
    assert compiled.registers <= 64
    assert compiled.stack == 0
    assert compiled.spills == 0


SHAPES = [((1,), 16, 32), ((2, 131), 3072, 12288), ((77,), 80, 48)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES, ids=str)
def test_linear_gelu_on_gpu_errs_at_most_half_more_than_pytorch(
    rows: tuple[int, ...], width: int, outputs: int, dtype: torch.dtype
) -> None:
    tensors = inputs(*rows, width=width, outputs=outputs, dtype=dtype, device="cuda")
    exact = linear_gelu_reference(*(tensor.double() for tensor in tensors))
    ours, theirs = (relative_error(function(*tensors), exact) for function in (linear_gelu, linear_gelu_reference))
    assert ours <= 1.5 * theirs


@pytest.mark.gpu
def test_linear_gelu_on_gpu_is_the_tanh_form_and_not_erf() -> None:
    x, weight, bias = inputs(64, width=64, outputs=64, dtype=torch.float32, device="cuda")
    pre = F.linear(x.double(), weight.double(), bias.double())
    out = linear_gelu(x, weight, bias)
    assert relative_error(out, F.gelu(pre, approximate="tanh")) < 0.3 * relative_error(out, F.gelu(pre))


@pytest.mark.gpu
def test_linear_gelu_on_gpu_compiled_whole_matches_eager() -> None:
    tensors = inputs(2, 131, width=256, outputs=512, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(torch.compile(linear_gelu, fullgraph=True)(*tensors), linear_gelu(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "plain"])
@pytest.mark.parametrize("shape", [(2, 131, 12288), (77, 3072), (5, 80), (1, 16384)], ids=str)
def test_quantize_kernel_gives_the_nearest_of_each_rows_scale(shape: tuple[int, ...], gelu: bool) -> None:
    x = 3 * random(*shape, dtype=torch.bfloat16, device="cuda")
    x[0] = 0
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    x_float8, scale = (gelu_float8 if gelu else quantize_rows)(x)
    assert x_float8.shape == shape
    assert relative_error(scale[1:], exact.abs().amax(-1)[1:] / 448) < 1e-6 or len(scale) == 1
    assert float8_error(x_float8, scale, exact) < 0.501


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_quantize_kernel_poisoned_row_stays_alone(poison: float) -> None:
    x = random(50, 12288, dtype=torch.bfloat16, device="cuda")
    clean, clean_scale = gelu_float8(x)
    x[30, 7] = poison
    x_float8, scale = gelu_float8(x)
    assert (x_float8.float() * scale[:, None])[30].isnan().any()
    others = torch.arange(50, device="cuda") != 30
    assert torch.equal(x_float8.float()[others], clean.float()[others])
    assert torch.equal(scale[others], clean_scale[others])


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "outputs"), [((2, 131), 3072, 12288), ((77,), 12288, 3072)], ids=str)
def test_linear_float8_on_gpu_matches_its_reference(rows: tuple[int, ...], width: int, outputs: int) -> None:
    x, weight, bias = inputs(*rows, width=width, outputs=outputs, dtype=torch.bfloat16, device="cuda")
    tensors = (*quantize_rows(x), *quantize_rows(weight), bias)
    out = linear_float8(*tensors)
    assert relative_error(out, linear_float8_reference(*tensors)) < 5e-3
    assert relative_error(out, F.linear(x.double(), weight.double(), bias.double())) < 0.04


@pytest.mark.gpu
def test_float8_feed_forward_on_gpu_compiled_and_in_a_graph_matches_eager_bitwise() -> None:
    x, weight, bias = inputs(2, 131, width=256, outputs=512, dtype=torch.bfloat16, device="cuda")
    first, second = quantize_rows(weight), quantize_rows(weight.t().contiguous())

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = linear_float8(*quantize_rows(x), *first, bias)
        return linear_float8(*gelu_float8(hidden), *second, bias[:256])

    eager = feed_forward(x)
    assert torch.equal(torch.compile(feed_forward, fullgraph=True)(x), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = feed_forward(x)
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70656, 256), (21122, 3072), (4097, 80)], ids=str)
def test_column_sum_on_gpu_errs_at_most_a_rounding_and_repeats_to_the_bit(shape: tuple[int, int]) -> None:
    x = 1 + random(*shape, dtype=torch.bfloat16, device="cuda")
    total, exact = column_sum(x), x.double().sum(0)
    # bfloat16 keeps eight bits: half a step is at most 2^-8 of the number.
    assert ((total.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()
    assert torch.equal(column_sum(x), total)


@pytest.mark.gpu
def test_linear_on_gpu_over_many_rows_errs_no_more_than_pytorch() -> None:
    tensors = inputs(33, 276, width=256, outputs=1024, dtype=torch.bfloat16, device="cuda")
    grads = [random(33, 276, 1024, dtype=torch.bfloat16, device="cuda", seed=3)]
    ours, theirs = (
        errors_from_float64(lambda *x, f=function: (f(*x),), lambda *x: (F.linear(*x),), tensors, grads)
        for function in (linear, F.linear)
    )
    assert all(a <= 1.01 * b for a, b in zip(ours, theirs, strict=True))
