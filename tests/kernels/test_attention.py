"""The attention operator: PyTorch's own on the CPU, the plan in Triton's interpreter, the Hopper kernel on a GPU."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from echovideo_kernels import attention
from echovideo_kernels.attention import attention_reference, launch_attention
from echovideo_kernels.dispatch import table
from tests.kernels.comparing import relative_error, traced_operators
from tests.kernels.compiling import Compiled, compile_for_hopper, launches

module = importlib.import_module("echovideo_kernels.attention")

LOG2 = math.log(2)
SERVED = table()["sm_90"]["operators"]["attention"]["from_tokens"] + 37
"""A number of tokens from which on the kernel, and not PyTorch's, serves on Hopper."""


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention in float64, a head at a time."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    heads = [torch.softmax(scale * q[:, h] @ k[:, h].mT, dim=-1) @ v[:, h] for h in range(q.shape[1])]
    return torch.stack(heads, dim=2)


def normed_inputs(
    num_tokens: int, *, batch: int = 1, heads: int = 2, gain: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as the transformer makes them: q and k layer-normed with a gain, the softmax scale folded into q."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = torch.randn(3, batch, num_tokens, heads, 64, device="cuda", generator=generator)
    q, k = (torch.nn.functional.layer_norm(x, [64]) * gain for x in (q, k))
    return (q * (64**-0.5 / LOG2)).bfloat16(), k.bfloat16(), v.bfloat16()


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = LOG2) -> torch.Tensor:
    """The kernel's output, in memory that held NaN before."""
    poison = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
    del poison
    return launch_attention(q, k, v, scale, with_lse=False)[0]


def pytorch_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, expected: torch.Tensor) -> float:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        return relative_error(attention_reference(q, k, v, LOG2), expected)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_strided_inputs_match_softmax_in_float64(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 37, 3, 5, 16, generator=generator)
    q, k, v = packed.unbind(2)
    out = attention(q, k, v, scale)
    assert out.shape == (2, 37, 5, 16)
    assert relative_error(out, exact(q, k, v, scale if scale is not None else 16**-0.5)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 9, 2, 64), torch.float16), ((1, 9, 2, 32), torch.bfloat16)], ids=["dtype", "width"]
)
def test_launch_attention_inputs_it_cannot_take_are_refused_by_name(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=f"bfloat16, features adjacent.*{dtype}"):
        launch_attention(x, x, x, 1.0, with_lse=False)


def compiled_kernels(monkeypatch: pytest.MonkeyPatch, folder: Path, kernel: str, with_lse: bool) -> list[Compiled]:
    """The kernel as each of its launches at the main size compiles for Hopper."""
    x = torch.empty(2, 20896, 48, 64, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(module, "_multiprocessors", lambda _: 132)
    other = {"_plan_kernel": "_attention_kernel", "_attention_kernel": "_plan_kernel"}[kernel]

    def launch() -> None:
        launches(monkeypatch, module, other, lambda: launch_attention(x, x, x, LOG2, with_lse=with_lse))

    calls = launches(monkeypatch, module, kernel, launch)
    return [compile_for_hopper(getattr(module, kernel), *call, folder=folder) for call in calls]


def test_attention_plan_kernel_compiled_for_hopper_does_not_spill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (plan,) = compiled_kernels(monkeypatch, tmp_path, "_plan_kernel", False)
    assert (plan.registers <= 128, plan.stack, plan.spills) == (True, 0, 0)


@pytest.mark.parametrize("with_lse", [False, True])
def test_attention_kernel_compiled_for_hopper_overlaps_its_products_without_spilling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_lse: bool
) -> None:
    first, second = compiled_kernels(monkeypatch, tmp_path, "_attention_kernel", with_lse)
    for kernel in (first, second):
        # 640 threads share the 65,536 registers: 96 each at the start, 112 to 120 once the loading warp has given up.
        assert (kernel.registers, kernel.stack, kernel.spills) == (96, 0, 0)
    # Two kinds of instruction fence a group of products: were they run one by one, each would have its own pair.
    assert first.sass.count("HGMMA") >= 4 * first.sass.count("WARPGROUP.DEPBAR")


def test_attention_on_hopper_traces_whole_as_one_operator() -> None:
    x = torch.empty(1, SERVED, 2, 64, dtype=torch.bfloat16)
    assert traced_operators(attention, [x, x, x]) == ["echovideo.attention.default"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "num_tokens", "heads"),
    [(1, 1, 1), (2, 63, 3), (1, 64, 1), (3, 65, 2), (1, 255, 2), (2, 257, 2), (1, 1000, 5), (2, 3001, 3)],
)
def test_attention_kernel_any_shape_errs_at_most_half_more_than_pytorch(
    batch: int, num_tokens: int, heads: int
) -> None:
    q, k, v = normed_inputs(num_tokens, batch=batch, heads=heads)
    expected = exact(q, k, v, LOG2)
    assert relative_error(forward(q, k, v), expected) <= 1.5 * pytorch_error(q, k, v, expected)


@pytest.mark.gpu
def test_attention_kernel_tails_of_every_residue_match_float64() -> None:
    errors = []
    for num_tokens in range(193, 193 + 64):
        q, k, v = normed_inputs(num_tokens, heads=1, seed=num_tokens)
        errors.append(relative_error(forward(q, k, v), exact(q, k, v, LOG2)))
    assert max(errors) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0])
def test_attention_kernel_any_gain_and_magnitude_errs_at_most_half_more_than_pytorch(
    gain: float, magnitude: float
) -> None:
    q, k, v = normed_inputs(2500, gain=gain, seed=7)
    v = (v.float() * magnitude).bfloat16()
    expected = exact(q, k, v, LOG2)
    assert relative_error(forward(q, k, v), expected) <= 1.5 * pytorch_error(q, k, v, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("level", [-60.0, -2.0, 0.0, 20.0, 110.0, 300.0])
def test_attention_kernel_rows_all_equal_return_the_mean_of_v(level: float) -> None:
    q, k, v = normed_inputs(700)
    q, k = torch.full_like(q, 1 / 8), torch.full_like(k, level / 8)
    mean = v.double().mean(dim=1, keepdim=True).expand_as(v)
    assert relative_error(forward(q, k, v), mean) < 4e-3


@pytest.mark.gpu
def test_attention_kernel_some_tiles_failing_redoes_them_alone() -> None:
    q, k, v = normed_inputs(2000, heads=3)
    q[:, 300:310, 1] *= 40
    counts = tiles_of_second_pass(q, k, v)
    assert counts == (3 * 8, 1)
    expected = exact(q, k, v, LOG2)
    assert relative_error(forward(q, k, v), expected) <= 1.5 * pytorch_error(q, k, v, expected)


@pytest.mark.gpu
def test_attention_kernel_doomed_head_skips_the_first_pass() -> None:
    q, k, v = normed_inputs(2000, heads=3)
    q[:, :, 2] *= 40
    assert tiles_of_second_pass(q, k, v) == (2 * 8, 8)


def tiles_of_second_pass(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """How many tiles the first and the second pass worked on."""
    kept: list[torch.Tensor] = []
    original = torch.zeros

    def zeros(*args: object, **options: object) -> torch.Tensor:
        kept.append(original(*args, **options))  # type: ignore[call-overload]
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "zeros", zeros)
        launch_attention(q, k, v, LOG2, with_lse=False)
    first, second = kept[0][:2].tolist()
    return first, second


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_attention_kernel_poisoned_query_stays_in_its_row(poison: float) -> None:
    q, k, v = normed_inputs(600, batch=2)
    clean = exact(q, k, v, LOG2)
    q[1, 77, 1, 3] = poison
    out = forward(q, k, v)
    touched = torch.zeros(out.shape[:3], dtype=torch.bool, device="cuda")
    touched[1, 77, 1] = True
    assert out[touched].isnan().all()
    assert relative_error(out[~touched], clean[~touched]) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_attention_kernel_poisoned_key_or_value_stays_in_its_head(which: str, poison: float) -> None:
    q, k, v = normed_inputs(600, batch=2)
    clean = exact(q, k, v, LOG2)
    (k if which == "k" else v)[1, 321, 1, 5] = poison
    out, like = forward(q, k, v), exact(q, k, v, LOG2)
    touched = torch.zeros(out.shape[:3], dtype=torch.bool, device="cuda")
    touched[1, :, 1] = True
    assert not out[touched].isfinite().all()
    assert torch.equal(out.isnan(), like.isnan())
    assert relative_error(out[~touched], clean[~touched]) < 4e-3


@pytest.mark.gpu
def test_attention_kernel_views_of_one_buffer_match_copies_bitwise() -> None:
    q, k, v = normed_inputs(900, batch=2, heads=3)
    packed = torch.stack([q, k, v], dim=2)
    assert torch.equal(forward(*packed.unbind(2)), forward(q, k, v))


@pytest.mark.gpu
def test_attention_kernel_other_scale_matches_float64() -> None:
    q, k, v = normed_inputs(900)
    assert relative_error(forward(q, k, v, 0.11), exact(q, k, v, 0.11)) < 4e-3


@pytest.mark.gpu
def test_attention_kernel_thousand_runs_are_equal_bitwise() -> None:
    q, k, v = normed_inputs(2222, heads=8, gain=5.0)
    first = forward(q, k, v)
    assert tiles_of_second_pass(q, k, v)[1] > 0
    assert all(torch.equal(forward(q, k, v), first) for _ in range(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_attention_kernel_log_sum_exp_matches_float64(gain: float) -> None:
    q, k, v = normed_inputs(1500, batch=2, gain=gain)
    _, lse_BHN = launch_attention(q, k, v, LOG2, with_lse=True)
    logits = LOG2 * q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    # The sums are of weights rounded to bfloat16, which move the logarithm by no more than the rounding does.
    assert float((lse_BHN - logits.logsumexp(-1)).abs().max()) < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_attention_gradients_err_at_most_half_more_than_pytorch(gain: float) -> None:
    inputs = normed_inputs(SERVED, gain=gain)
    do = torch.randn_like(inputs[0])

    def gradients(function: object, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        function(*leaves, LOG2).backward(do.to(dtype))  # type: ignore[operator]
        return tuple(leaf.grad for leaf in leaves)  # type: ignore[misc]

    expected = gradients(exact, torch.float64)
    theirs = gradients(attention_reference, torch.bfloat16)
    for ours, other, gradient in zip(gradients(attention, torch.bfloat16), theirs, expected, strict=True):
        assert relative_error(ours, gradient) <= 1.5 * relative_error(other, gradient)


@pytest.mark.gpu
def test_attention_compiled_whole_matches_eager_bitwise() -> None:
    q, k, v = normed_inputs(SERVED)
    compiled = torch.compile(lambda a, b, c: attention(a, b, c, LOG2) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), forward(q, k, v) * 2)


@pytest.mark.gpu
def test_attention_graph_replayed_on_new_inputs_matches_eager_bitwise() -> None:
    q, k, v = normed_inputs(SERVED)
    forward(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, LOG2)
    for seed, gain in ((1, 1.0), (2, 8.0)):
        for buffer, new in zip((q, k, v), normed_inputs(SERVED, gain=gain, seed=seed), strict=True):
            buffer.copy_(new)
        graph.replay()
        assert torch.equal(out, forward(q, k, v))
