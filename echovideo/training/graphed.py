"""A step's loss and gradients as one CUDA graph, for networks of many small kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_WARM_UP = 3


class GraphedGradients:
    """Replays a function that leaves gradients in its parameters; launched one by one, small kernels wait for Python.

    `function` takes tensors of fixed shapes, calls backward and returns one tensor that carries no graph. It may not
    wait for the device nor draw random numbers. The parameters must stay where they are in memory.
    """

    def __init__(
        self, function: Callable[..., Tensor], parameters: Sequence[nn.Parameter], examples: Sequence[Tensor]
    ) -> None:
        assert all(parameter.grad is None for parameter in parameters)
        self._parameters = parameters
        self._inputs = [example.clone() for example in examples]
        # Off the default stream, as a capture needs it: what is chosen and allocated once is so before the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function(*self._inputs)
                self._release()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Without gradients to add to, backward makes them in the graph's own memory, and each replay makes them anew.
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)
        self._gradients = [parameter.grad for parameter in parameters]
        self._release()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's output, which the next call overwrites; the gradients are in the parameters again."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._output

    def _release(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
