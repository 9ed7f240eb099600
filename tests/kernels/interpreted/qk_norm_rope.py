"""The query and key kernels themselves, run by Triton's interpreter, against float64."""

import importlib
import math
from typing import Any

import pytest
import torch

from echovideo_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_reference
from tests.kernels.comparing import outputs_and_gradients, random, relative_error, rotary

module = importlib.import_module("echovideo_kernels.qk_norm_rope")

Q_SCALE = 0.18


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serves", lambda *_: True)


def inputs(
    batch: int, num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q and k as slices of one buffer, and the weights."""
    packed = random(batch, num_tokens, 3 * heads * head_dim, dtype=dtype)
    q, k, _ = packed.unflatten(-1, (3, heads, head_dim)).unbind(2)
    return [q, k, *(1 + 0.5 * random(4, head_dim, seed=1)).to(dtype)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float16, 5e-4)])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "heads", "head_dim", "num_video"),
    [(2, 23, 3, 64, 17), (1, 5, 5, 32, 0), (1, 3, 2, 16, 3)],
    ids=["joint", "no-rotary", "no-text"],
)
def test_qk_norm_rope_kernel_odd_shapes_match_float64_with_gradients(
    batch: int, num_tokens: int, heads: int, head_dim: int, num_video: int, dtype: torch.dtype, bound: float
) -> None:
    tensors = inputs(batch, num_tokens, heads, head_dim, dtype)
    tables = rotary(num_video, head_dim)
    grads = list(random(2, batch, num_tokens, heads, head_dim, dtype=dtype, seed=2))
    ours = outputs_and_gradients(lambda *x: qk_norm_rope(*x, *tables, q_scale=Q_SCALE), tensors, grads)
    exact = outputs_and_gradients(
        lambda *x: qk_norm_rope_reference(*x, *tables, q_scale=Q_SCALE), [x.double() for x in tensors], grads
    )
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < bound


def test_qk_norm_rope_kernel_gradient_of_any_strides_matches_float64() -> None:
    tensors, tables = inputs(2, 7, 3, 16), rotary(5, 16)
    grads = [random(2, 3, 7, 16).transpose(1, 2), random(16, 2, 7, 3).permute(1, 2, 3, 0)]
    ours = outputs_and_gradients(lambda *x: qk_norm_rope(*x, *tables, q_scale=Q_SCALE), tensors, grads)
    exact = outputs_and_gradients(
        lambda *x: qk_norm_rope_reference(*x, *tables, q_scale=Q_SCALE), [x.double() for x in tensors], grads
    )
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 3e-7


def test_qk_norm_rope_backward_kernel_programs_that_share_tiles_give_the_same_sums() -> None:
    x, grad, weight, *_ = inputs(2, 29, 3, 16)
    tables = rotary(20, 16)
    alone = module._launch_backward(grad, x, weight, *tables, 1.0, 1e-6, {"ROWS": 128, "PROGRAMS": 9, "num_warps": 4})
    shared = module._launch_backward(grad, x, weight, *tables, 1.0, 1e-6, {"ROWS": 8, "PROGRAMS": 5, "num_warps": 4})
    assert torch.equal(shared[0], alone[0])
    assert relative_error(shared[1], alone[1]) < 3e-7


def test_qk_norm_rope_kernel_in_place_changes_q_and_k_alone() -> None:
    packed = random(2, 9, 3, 3, 16)
    before, tables = packed.clone(), rotary(6, 16)
    weights = random(4, 16, seed=1)
    q, k, v = packed.unbind(2)
    expected = qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    returned = qk_norm_rope_(q, k, *weights, *tables, q_scale=Q_SCALE)
    assert returned[0] is q
    assert returned[1] is k
    assert torch.equal(packed[:, :, 0], expected[0])
    assert torch.equal(packed[:, :, 1], expected[1])
    assert torch.equal(v, before[:, :, 2])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_qk_norm_rope_kernel_poisoned_row_stays_alone_and_all_else_is_written(poison: float) -> None:
    q, k, *weights = inputs(2, 9, 3, 16)
    tables = rotary(6, 16)
    clean = qk_norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
    q[1, 4, 2, 7] = poison
    outs = [torch.full(q.shape, math.nan) for _ in range(2)]
    module._launch_forward(q, k, *weights, *tables, Q_SCALE, 1e-6, *outs)
    assert outs[0][1, 4, 2].isnan().all()
    outs[0][1, 4, 2] = clean[0][1, 4, 2]
    assert torch.equal(outs[0], clean[0])
    assert torch.equal(outs[1], clean[1])


def test_qk_norm_rope_backward_kernel_poisoned_row_stays_alone() -> None:
    x, _, weight, *_ = inputs(2, 9, 3, 16)
    tables, grad = rotary(6, 16), random(2, 9, 3, 16, seed=3)
    clean, _ = module._launch_backward(grad, x, weight, *tables, 1.0, 1e-6)
    grad[1, 4, 2, 7] = math.nan
    dx, _ = module._launch_backward(grad, x, weight, *tables, 1.0, 1e-6)
    assert dx[1, 4, 2].isnan().all()
    dx[1, 4, 2] = clean[1, 4, 2]
    assert torch.equal(dx, clean)


def test_qk_norm_rope_kernel_rows_beyond_32_bit_offsets_match_float64() -> None:
    # Only the pages that are touched are ever given memory.
    stride = 2**30 + 64
    q = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((1, 3, 2, 16), (3 * stride, stride, 16, 1))
    q.copy_(random(1, 3, 2, 16))
    tensors, tables = [q, q, *random(4, 16, dtype=torch.float16, seed=1)], rotary(2, 16)
    exact = qk_norm_rope_reference(*(x.double() for x in tensors), *tables, q_scale=Q_SCALE)
    ours = qk_norm_rope(*tensors, *tables, q_scale=Q_SCALE)
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 5e-4


def test_qk_norm_rope_operators_keep_the_rules_of_operators() -> None:
    tensors, tables = inputs(1, 5, 2, 16), rotary(3, 16)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(module._qk_norm_rope, (*leaves, *tables, Q_SCALE, 1e-6))
    torch.library.opcheck(module._qk_norm_rope_, (*(x.clone() for x in tensors), *tables, Q_SCALE, 1e-6))
    torch.library.opcheck(
        module._norm_rope_backward, (tensors[0].clone(), tensors[1].clone(), tensors[2], *tables, 1.0, 1e-6)
    )


@pytest.mark.parametrize("norm_rope", [qk_norm_rope, qk_norm_rope_])
def test_qk_norm_rope_kernel_compiled_whole_matches_eager_bitwise(norm_rope: Any) -> None:
    tables, weights = rotary(3, 16), random(4, 16, seed=1)

    def call(packed: torch.Tensor) -> torch.Tensor:
        q, k, v = (2 * packed).unbind(2)
        q, k = norm_rope(q, k, *weights, *tables, q_scale=Q_SCALE)
        return q * k + v

    packed = random(1, 5, 3, 2, 16)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(packed), call(packed))


@pytest.mark.parametrize("head_dim", [24, 512])
def test_qk_norm_rope_kernel_head_width_it_cannot_take_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"not {head_dim}"):
        qk_norm_rope(*inputs(1, 2, 1, head_dim), *rotary(1, head_dim), q_scale=1.0)


def test_qk_norm_rope_kernel_scattered_features_are_refused() -> None:
    q, k, *weights = inputs(1, 4, 2, 16)
    with pytest.raises(ValueError, match="adjacent in memory, not 2 apart"):
        qk_norm_rope(q.mT.contiguous().mT, k, *weights, *rotary(1, 16), q_scale=1.0)
