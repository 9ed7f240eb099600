"""Which kernel serves a call: a table of choices measured on a chip; whatever it does not name is PyTorch's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from echovideo_kernels._triton import triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def table() -> Mapping[str, Any]:
    """Return `tuned.json`: by compute capability, what was measured where, and each operator's settings."""
    chips: Mapping[str, Any] = json.loads((files("echovideo_kernels") / "tuned.json").read_text())
    return chips


def serves(operator: str, tensor: torch.Tensor, num_tokens: int) -> bool:
    """Return whether the operator's kernel serves a call of this many tokens, or else PyTorch's own.

    PyTorch's does on CPU, in float64, without Triton, on a chip that is not in the table, and below `from_tokens`.
    """
    if triton is None or not tensor.is_cuda or tensor.dtype not in _DTYPES:
        return False
    from_tokens: int = _from_tokens(operator, tensor.device)
    return from_tokens >= 0 and num_tokens >= from_tokens


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _from_tokens(operator: str, device: torch.device) -> int:
    entry = table().get(_chip(device), {}).get("operators", {}).get(operator)
    return -1 if entry is None else int(entry["from_tokens"])


def options(operator: str, tensor: torch.Tensor) -> dict[str, int]:
    """Return the options that the kernel is launched with on the tensor's chip; on none, those of sm_90."""
    chip = _chip(tensor.device) if tensor.is_cuda else "sm_90"
    entry = table()[chip]["operators"][operator]
    return {name: value for name, value in entry.items() if name != "from_tokens"}


def _chip(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
