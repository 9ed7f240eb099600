"""Triton where it is installed; elsewhere placeholders, so that this package imports without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ModuleNotFoundError:
    triton = tl = gluon = gl = hopper = None

__all__ = ["gl", "gluon_jit", "hopper", "jit", "tl", "triton"]

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(kernel: Kernel) -> Any:
    """Make a Triton kernel of a function, or leave it alone where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


def gluon_jit(kernel: Kernel) -> Any:
    """Make a Gluon kernel of a function, or leave it alone where there is no Triton."""
    return kernel if gluon is None else gluon.jit(kernel)
