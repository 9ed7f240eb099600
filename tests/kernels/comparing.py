"""Numbers and inputs that the kernels' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Outputs = tuple[torch.Tensor, ...]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative Frobenius error, in float64."""
    expected = expected.double()
    return float((value.double() - expected).norm() / expected.norm())


def float8_error(x_float8: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor) -> float:
    """Return how far the values are from exact / scale at most, in steps of float8_e4m3fn there: 0.5 is nearest."""
    value = exact.double() / scale.double()[..., None]
    _, exponent = value.frexp()
    step = torch.ldexp(torch.ones_like(value), (exponent - 1).clamp_min(-6) - 3)
    return float(((x_float8.double() - value).abs() / step).max())


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Return a standard normal tensor, rounded to the dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def rotary(num_tokens: int, head_dim: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of random angles, each for the two features of its pair."""
    angles = 3 * random(num_tokens, head_dim // 2, device=device, seed=99).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def outputs_and_gradients(
    function: Callable[..., Outputs], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> Outputs:
    """Return the function's outputs and its gradients in every input, in the inputs' dtype."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [grad.to(inputs[0].dtype) for grad in grads])
    return *(output.detach() for output in outputs), *gradients


def errors_from_float64(
    function: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
) -> list[float]:
    """Return the relative errors of the function's outputs and gradients from those of the reference in float64."""
    ours = outputs_and_gradients(function, inputs, grads)
    exact = outputs_and_gradients(reference, [tensor.double() for tensor in inputs], grads)
    return [relative_error(a, b) for a, b in zip(ours, exact, strict=True)]


@contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within, tensors without contents can be made on a GPU of this capability."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        yield


def traced_operators(function: Callable[..., object], inputs: Sequence[torch.Tensor]) -> list[str]:
    """Return the project's operators in the function's one graph for inputs like these on Hopper; needs no GPU."""
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        operators.extend(str(node.target) for node in graph.graph.nodes if "echovideo" in str(node.target))
        return graph.forward

    with pretended_gpu():
        like = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in inputs]
        torch.compile(function, fullgraph=True, backend=backend)(*like)
    return operators
