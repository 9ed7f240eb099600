"""AdamW over float32 master weights, in chunks, with the gradient's norm clipped and bad gradients left out.

A model in bfloat16 would lose updates smaller than its rounding, so the optimizer holds the weights in float32 and the
model holds them rounded. A model in float32 is its own master. Works on whole tensors and on FSDP2's shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from echovideo.training.settings import StageSettings

_CHUNK_ELEMENTS = 2**27
_EPS = 1e-8


class MasterAdamW:
    """The optimizer of a model's trainable parameters, and their moving average if the settings ask for one.

    Beside the model it needs 8 bytes a trained parameter for the moments, 4 for a bfloat16 model's masters, 4 for an
    average, and about a GiB at work. Nothing in `step` waits for the device, but an average on the CPU.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: StageSettings) -> None:
        self._settings = settings
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.masters: dict[str, torch.Tensor] = {
            name: parameter.detach() if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self.first_moments = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.second_moments = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.averages: dict[str, torch.Tensor] = {}
        if settings.average:
            to_cpu = settings.average.device == "cpu"
            self.averages = {
                name: (master.cpu() if to_cpu else master).clone() for name, master in self.masters.items()
            }
        device = _local(next(iter(self.masters.values()))).device
        self.updates = torch.zeros((), device=device)
        """How many steps moved the weights: the steps taken, less those left out."""

    @torch.no_grad()
    def step(self, step: int, losses_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Move the weights by their gradients, and free these; `step` counts from 0.

        Returns the means of all processes' `losses_L` (L,), the gradient's norm before clipping, and 1 if any of these
        is not finite, else 0; float32 on the device. In that case no weight, moment or average changes.
        """
        gradients = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} takes no part in the loss"
            gradients[name] = _local(parameter.grad)
        squares = torch.stack(torch._foreach_norm(list(gradients.values()), 2, dtype=torch.float32)).square().sum()
        totals = torch.cat([losses_L.detach().float(), squares[None]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
            # Every process holds its shard of the gradient, but a loss of its own.
            totals[:-1] /= dist.get_world_size()
        norm = totals[-1].sqrt()
        bad = (~totals.isfinite().all()).float()
        divisor = (norm / self._settings.clip_norm).clamp(min=1)
        rate = self._settings.rate(step)
        keep = self._average_share(step)
        for names in self._chunks():
            given = [gradients[name] for name in names]
            chunk = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
            torch._foreach_copy_(chunk, given)
            masters = [_local(self.masters[name]) for name in names]
            # One for each tensor, because the operator counts them all up.
            updates = list(self.updates.expand(len(names)).clone().unbind())
            adamw(
                masters,
                chunk,
                [_local(self.first_moments[name]) for name in names],
                [_local(self.second_moments[name]) for name in names],
                [],
                updates,
                fused=True,
                grad_scale=divisor,
                found_inf=bad,
                amsgrad=False,
                beta1=self._settings.betas[0],
                beta2=self._settings.betas[1],
                lr=rate,
                weight_decay=self._settings.weight_decay,
                eps=_EPS,
                maximize=False,
            )
            self._round(names)
            if keep is not None:
                averages = [_local(self.averages[name]) for name in names]
                moved = torch._foreach_sub([master.to(averages[0].device) for master in masters], averages)
                torch._foreach_mul_(moved, (keep * (1 - bad)).to(averages[0].device))
                torch._foreach_add_(averages, moved)
        self.updates += 1 - bad
        for parameter in self.parameters.values():
            parameter.grad = None
        return totals[:-1], norm, bad

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the model the averaged weights, if there are any; on leaving it has its own again, to the bit."""
        if not self.averages:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.parameters.items() if p.dtype == torch.float32}
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    _local(parameter).copy_(_local(self.averages[name]))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    _local(parameter).copy_(_local(own.get(name, self.masters[name])))

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the model with the averaged weights, if there are any; the optimizer is of no use after it."""
        for name, average in self.averages.items():
            _local(self.parameters[name]).copy_(_local(average))

    def state(self) -> dict[str, Mapping[str, torch.Tensor] | torch.Tensor]:
        """Return all that has to outlive the process, as the tensors themselves; averages are absent where off."""
        return {
            "masters": self.masters,
            "first_moments": self.first_moments,
            "second_moments": self.second_moments,
            **({"averages": self.averages} if self.averages else {}),
            "updates": self.updates,
        }

    @torch.no_grad()
    def restored(self) -> None:
        """Give the model its weights after `state`'s tensors were filled from a checkpoint."""
        self._round(self.masters)

    def _round(self, names: Iterable[str]) -> None:
        rounded = [name for name in names if self.parameters[name].dtype != torch.float32]
        if rounded:
            torch._foreach_copy_(
                [_local(self.parameters[name]) for name in rounded], [_local(self.masters[name]) for name in rounded]
            )

    def _average_share(self, step: int) -> float | None:
        """Return how far the average moves to the weights in this step; None for a step in which it rests.

        The decay starts low, min(decay, (1 + n) / (10 + n)), so that a short run's average is not its beginning.
        """
        average = self._settings.average
        if average is None or (step + 1) % average.every:
            return None
        taken = (step + 1) // average.every
        return 1.0 - float(min(average.decay**average.every, (1 + taken) / (10 + taken)))

    def _chunks(self) -> Iterator[list[str]]:
        """Yield the names in groups whose float32 gradients are small beside the model."""
        chunk: list[str] = []
        size = 0
        for name, master in self.masters.items():
            count = _local(master).numel()
            if count == 0:  # A shard of a tensor with fewer rows than there are processes.
                continue
            if chunk and size + count > _CHUNK_ELEMENTS:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += count
        if chunk:
            yield chunk


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
