"""The modulated norm's kernels themselves, run by Triton's interpreter, against float64."""

import importlib
import math
from typing import Any

import pytest
import torch

from echovideo_kernels.modulated_norm import (
    modulated_norm,
    modulated_norm_,
    modulated_norm_float8_,
    modulated_norm_reference,
)
from tests.kernels.comparing import float8_error, outputs_and_gradients, random, relative_error
from tests.kernels.interpreted._float8 import convert_as_hardware_does

module = importlib.import_module("echovideo_kernels.modulated_norm")

EPS = 1e-5


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serves", lambda *_: True)
    convert_as_hardware_does(monkeypatch)


def inputs(
    batch: int, num_tokens: int, dim: int, dtype: torch.dtype = torch.float32, branch: bool = True
) -> list[torch.Tensor]:
    """x as a slice of wider rows, modulations as slices of one linear layer's output, weights, branch and its gate."""
    x = 2 + random(batch, num_tokens, 3 * dim, dtype=dtype)[..., dim : 2 * dim]
    shift, scale, gate = random(batch, 6 * dim, dtype=dtype, seed=1).view(batch, 2, 3, dim).unbind(2)
    weight, bias = random(2, dim, dtype=dtype, seed=2)
    return [x, shift, scale, weight, bias, *([random(*x.shape, dtype=dtype, seed=3), gate] if branch else [])]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float16, 6e-4)])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "dim", "num_text"),
    [(2, 17, 80, 5), (1, 7, 256, 0), (1, 3, 1040, 3)],
    ids=["joint", "no-text", "text-alone"],
)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_modulated_norm_kernel_odd_shapes_match_float64_with_gradients(
    batch: int, num_tokens: int, dim: int, num_text: int, branch: bool, dtype: torch.dtype, bound: float
) -> None:
    tensors = inputs(batch, num_tokens, dim, dtype, branch)
    grads = list(random(2, batch, num_tokens, dim, dtype=dtype, seed=4))
    ours = outputs_and_gradients(lambda *x: modulated_norm(*x, num_text=num_text, eps=EPS), tensors, grads)
    exact = outputs_and_gradients(
        lambda *x: modulated_norm_reference(*x, num_text=num_text, eps=EPS), [x.double() for x in tensors], grads
    )
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < bound


@pytest.mark.parametrize("rows", [1, 4])
def test_modulated_norm_kernel_other_tiles_give_the_same_numbers(rows: int) -> None:
    tensors = inputs(1, 17, 80)
    plain = torch.full_like(tensors[5], math.nan), torch.full_like(tensors[5], math.nan)
    other = torch.full_like(tensors[5], math.nan), torch.full_like(tensors[5], math.nan)
    module._launch_forward(*tensors, 5, EPS, *plain)
    config = {"TOKENS": 8, "ROWS": rows, "STAGES": 2, "CHUNK": 32, "num_warps": 4}
    module._launch_forward(*tensors, 5, EPS, *other, config=config)
    assert torch.equal(other[0], plain[0])
    assert relative_error(other[1], plain[1]) < 3e-7
    dy = random(2, 1, 17, 80, seed=4)
    x, _, scale, weight, _, branch, gate = tensors
    plain_grads = module._launch_backward(x, scale, weight, branch, gate, 5, EPS, *dy)
    other_grads = module._launch_backward(x, scale, weight, branch, gate, 5, EPS, *dy, config)
    assert max(relative_error(a, b) for a, b in zip(other_grads, plain_grads, strict=True)) < 3e-7


def test_modulated_norm_kernel_in_place_changes_x_alone() -> None:
    wide = random(2, 9, 3 * 32)
    before = wide.clone()
    x, others = wide[..., 32:64], inputs(2, 9, 32)[1:]
    kept = [tensor.clone() for tensor in others]
    residual, y = modulated_norm(x, *others, num_text=4, eps=EPS)
    assert torch.equal(wide, before)
    in_place = modulated_norm_(x, *others, num_text=4, eps=EPS)
    assert in_place[0] is x
    assert torch.equal(x, residual)
    assert torch.equal(in_place[1], y)
    assert torch.equal(wide[..., :32], before[..., :32])
    assert torch.equal(wide[..., 64:], before[..., 64:])
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))


def test_modulated_norm_kernel_without_a_branch_leaves_x() -> None:
    x, *others = inputs(2, 9, 32, branch=False)
    before = x.clone()
    residual, y = modulated_norm_(x, *others, num_text=4, eps=EPS)
    assert residual is x
    assert torch.equal(x, before)
    assert torch.equal(y, modulated_norm(x, *others, num_text=4, eps=EPS)[1])


def test_modulated_norm_float8_kernel_gives_the_nearest_of_each_rows_scale() -> None:
    x, *others = inputs(2, 9, 80)
    residual, y = modulated_norm_reference(*(tensor.double() for tensor in (x, *others)), num_text=4, eps=EPS)
    returned, y_float8, y_scale = modulated_norm_float8_(x, *others, num_text=4, eps=EPS)
    assert returned is x
    assert relative_error(x, residual) < 3e-7
    assert y_float8.dtype == torch.float8_e4m3fn
    assert relative_error(y_scale, y.abs().amax(-1) / 448) < 3e-7
    assert float8_error(y_float8, y_scale, y) < 0.5001


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 5], ids=["x", "branch"])
def test_modulated_norm_kernel_poisoned_row_stays_alone(which: int, poison: float) -> None:
    tensors = inputs(2, 9, 32)
    clean = modulated_norm(*tensors, num_text=4, eps=EPS)
    dy = random(2, 2, 9, 32, seed=4)
    x, _, scale, weight, _, branch, gate = tensors
    clean += module._launch_backward(x, scale, weight, branch, gate, 4, EPS, *dy)[:2]
    tensors[which][1, 6, 3] = poison
    outs = modulated_norm(*tensors, num_text=4, eps=EPS)
    assert outs[1][1, 6].isnan().all()
    outs += module._launch_backward(outs[0], scale, weight, branch, gate, 4, EPS, *dy)[:2]
    others = torch.ones(2, 9, dtype=torch.bool)
    others[1, 6] = False
    assert all(torch.equal(out[others], like[others]) for out, like in zip(outs[:2], clean[:2], strict=True))
    assert all(out[others].isfinite().all() for out in outs[2:])


def test_modulated_norm_kernel_rows_beyond_32_bit_offsets_match_float64() -> None:
    # Only the pages that are touched are ever given memory.
    stride = 2**30 + 64
    _, *others = inputs(1, 3, 32, torch.float16)
    x = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((1, 3, 32), (3 * stride, stride, 1))
    x.copy_(random(1, 3, 32))
    exact = modulated_norm_reference(*(tensor.double() for tensor in (x, *others)), num_text=1, eps=EPS)
    ours = modulated_norm_(x, *others, num_text=1, eps=EPS)
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 6e-4


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_modulated_norm_operators_keep_the_rules_of_operators(branch: bool) -> None:
    tensors = [tensor.clone() for tensor in inputs(1, 3, 32, branch=branch)]
    absent = [] if branch else [None, None]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(module._modulated_norm, (*leaves, *absent, 1, EPS))
    torch.library.opcheck(module._modulated_norm_, (*tensors, *absent, 1, EPS))
    torch.library.opcheck(module._modulated_norm_float8_, (*tensors, *absent, 1, EPS))
    x, _, scale, weight, _, *rest = (*tensors, *absent)
    torch.library.opcheck(
        module._modulated_norm_backward, (x, scale, weight, *rest, 1, EPS, *random(2, 1, 3, 32, seed=4).clone())
    )


@pytest.mark.parametrize("norm", [modulated_norm, modulated_norm_])
def test_modulated_norm_kernel_compiled_whole_matches_eager_bitwise(norm: Any) -> None:
    x, *others = inputs(2, 5, 32)

    def call(x: torch.Tensor) -> torch.Tensor:
        residual, y = norm(x * 2, *others, num_text=2, eps=EPS)
        return residual * y

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_modulated_norm_kernel_width_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4096, not 4112"):
        modulated_norm(*inputs(1, 1, 4112), num_text=0, eps=EPS)


def test_modulated_norm_kernel_scattered_features_are_refused() -> None:
    x, *others = inputs(1, 4, 32)
    with pytest.raises(ValueError, match="adjacent in memory, not 4 apart"):
        modulated_norm(x.mT.contiguous().mT, *others, num_text=0, eps=EPS)
