"""The quantising and the summing kernel themselves, run by Triton's interpreter, against float64."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from echovideo_kernels.linear import column_sum, gelu_float8, linear, quantize_rows
from tests.kernels.comparing import errors_from_float64, float8_error, random, relative_error
from tests.kernels.interpreted._float8 import convert_as_hardware_does

module = importlib.import_module("echovideo_kernels.linear")


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serves", lambda *_: True)
    convert_as_hardware_does(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 80), (5, 256), (2, 6160)])
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "plain"])
def test_quantize_kernel_odd_shapes_give_the_nearest_of_each_rows_scale(
    shape: tuple[int, ...], gelu: bool, dtype: torch.dtype
) -> None:
    x = 3 * random(*shape, dtype=dtype)
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    x_float8, scale = (gelu_float8 if gelu else quantize_rows)(x)
    assert x_float8.dtype == torch.float8_e4m3fn
    assert x_float8.shape == shape
    assert relative_error(scale, exact.abs().amax(-1) / 448) < 3e-7
    assert float8_error(x_float8, scale, exact) < 0.5001


def test_quantize_kernel_extreme_rows_match_their_meaning() -> None:
    x = torch.zeros(4, 32)
    x[1] = 1e-37
    x[2] = 3e38
    x[3, ::2] = -3e38
    x_float8, scale = quantize_rows(x)
    assert torch.equal(x_float8[0].float(), torch.zeros(32))
    assert relative_error(x_float8[2:].double() * scale[2:, None].double(), x[2:]) < 1e-6
    assert scale.isfinite().all()
    gelu, gelu_scale = gelu_float8(x)
    assert relative_error(gelu[2].double() * gelu_scale[2].double(), x[2]) < 1e-6
    assert torch.equal(gelu[3].float(), torch.zeros(32))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_quantize_kernel_poisoned_row_stays_alone(poison: float) -> None:
    x = random(5, 64)
    clean, clean_scale = gelu_float8(x)
    x[3, 7] = poison
    x_float8, scale = gelu_float8(x)
    others = torch.tensor([0, 1, 2, 4])
    assert (x_float8.float() * scale[:, None])[3].isnan().any()
    assert torch.equal(x_float8[others].float(), clean[others].float())
    assert torch.equal(scale[others], clean_scale[others])


def test_quantize_operator_keeps_the_rules_of_operators() -> None:
    torch.library.opcheck(module._quantize_rows, (random(2, 3, 32), True))


def test_quantize_kernel_compiled_whole_matches_eager_bitwise() -> None:
    x = random(3, 32)
    compiled = torch.compile(gelu_float8, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(compiled(x), gelu_float8(x), strict=True))


def test_quantize_kernel_width_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 16384 features, not 16400"):
        quantize_rows(random(1, 16400))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float16, 6e-4)])
@pytest.mark.parametrize("shape", [(1, 1), (37, 80), (130, 272)], ids=str)
def test_column_sum_kernel_odd_shapes_and_wider_rows_match_float64(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    x = 1 + random(shape[0], 2 * shape[1], dtype=dtype)[:, : shape[1]]
    for given in (x, x.t().contiguous().t()):
        total = column_sum(given)
        assert total.dtype == dtype
        assert relative_error(total, x.double().sum(0)) < bound


def test_column_sum_kernel_one_program_or_many_give_the_same_sums() -> None:
    x = random(133, 48)
    config = {"ROWS": 8, "COLUMNS": 16, "num_warps": 4}
    for programs in (1, 9, 1000):
        total = module._launch_column_sum(x, config | {"PROGRAMS": programs})
        assert relative_error(total, x.double().sum(0)) < 5e-7


def test_column_sum_operator_keeps_the_rules_of_operators() -> None:
    torch.library.opcheck(module._column_sum, (random(5, 32),))


def test_linear_with_the_kernel_matches_float64_with_gradients() -> None:
    tensors = [random(3, 7, 32), random(48, 32, seed=1), random(48, seed=2)]
    grads = [random(3, 7, 48, seed=3)]
    errors = errors_from_float64(lambda *x: (linear(*x),), lambda *x: (F.linear(*x),), tensors, grads)
    assert max(errors) < 3e-7
