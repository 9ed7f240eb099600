"""Training of the tiny model's small parts: bf16 weights over fp32 masters, averaged, on one device or several."""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_AVERAGING = 0.999
_CLIP_NORM = 1.0
_REPORT_SECONDS = 10.0


class Optimised(Generic[Model]):
    """A model in training: `model` computes in bf16, `step` takes its gradients to fp32 masters and their average.

    AdamW (0.9, 0.98) with warm-up and a cosine to nothing over `steps`. Gradients are averaged over all processes.
    """

    def __init__(
        self, model: Model, *, learning_rate: float, warmup: int, steps: int, channels_last: bool = False
    ) -> None:
        self._master = model
        self.model = copy.deepcopy(model).bfloat16()
        for parameter in self.model.parameters() if channels_last else ():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self._average = [parameter.detach().clone() for parameter in model.parameters()]
        self._pairs = list(zip(model.parameters(), self.model.parameters(), strict=True))
        fused = next(model.parameters()).is_cuda
        self._adam = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
        )
        self._steps_taken = 0

    def step(self) -> None:
        """Move the weights along the gradients that `model` has gathered, and forget them."""
        for master, working in self._pairs:
            assert working.grad is not None
            master.grad = working.grad.float()
            working.grad = None
        if dist.is_initialized():
            flat = torch.cat([master.grad.flatten() for master, _ in self._pairs if master.grad is not None])
            dist.all_reduce(flat, op=dist.ReduceOp.AVG)
            parts = flat.split([master.numel() for master, _ in self._pairs])
            for (master, _), part in zip(self._pairs, parts, strict=True):
                master.grad = part.view_as(master)
        nn.utils.clip_grad_norm_(self._master.parameters(), _CLIP_NORM)
        self._adam.step()
        self._schedule.step()
        self._steps_taken += 1
        with torch.no_grad():
            masters = [master for master, _ in self._pairs]
            torch._foreach_copy_([working for _, working in self._pairs], masters)
            # A short run must not remember its random start.
            torch._foreach_lerp_(self._average, masters, 1 - min(_AVERAGING, 1 - 1 / (1 + 0.1 * self._steps_taken)))

    def averaged(self) -> Model:
        """Return the model with the average of its fp32 weights, in eval mode."""
        with torch.no_grad():
            for parameter, average in zip(self._master.parameters(), self._average, strict=True):
                parameter.copy_(average)
        return self._master.eval().requires_grad_(False)


@dataclass(kw_only=True, slots=True)
class Progress:
    """Says on stderr how a training goes, from the first of the processes."""

    name: str
    steps: int
    rank: int = 0
    world_size: int = 1
    _started: float = field(default_factory=time.perf_counter)
    _reported: float = field(default_factory=time.perf_counter)

    def __call__(self, step: int, **numbers: Tensor) -> None:
        """Report the step's numbers, if the last report is some seconds old; only then they are fetched."""
        now = time.perf_counter()
        if self.rank or (now - self._reported < _REPORT_SECONDS and step + 1 < self.steps):
            return
        self._reported = now
        said = ", ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        pace = (step + 1) / (now - self._started)
        print(f"{self.name}: {step + 1}/{self.steps}, {pace:.2f} steps/s, {said}", file=sys.stderr, flush=True)
