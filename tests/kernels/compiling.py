"""Compiles a Triton or Gluon kernel for Hopper as its own launcher would launch it, and reads what ptxas made of it.

No GPU is needed: the launcher is called with meta tensors and its kernel replaced by a recorder, so that shapes,
strides, alignments and options are those of the real call.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

HOPPER = GPUTarget("cuda", 90, 32)
_CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One kernel's machine code for sm_90a: registers a thread, bytes of stack, shared bytes, and its SASS."""

    registers: int
    stack: int
    shared: int
    sass: str

    @property
    def spills(self) -> int:
        """How many instructions touch local memory."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def launched(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, kernel: str, launch: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and options of the one launch of `module.kernel` that `launch` makes, without launching."""
    (call,) = launches(monkeypatch, module, kernel, launch)
    return call


def launches(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, kernel: str, launch: Callable[[], object]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments and options of every launch of `module.kernel` that `launch` makes, without launching."""
    recorder = _Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(module, kernel, recorder)
        launch()
    return recorder.calls


def compile_for_hopper(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], folder: Path) -> Compiled:
    """Compile `kernel[grid](*args, **options)` for sm_90a, specialised as Triton's launcher specialises it."""
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=HOPPER, options=parsed.__dict__)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _cuobjdump("--dump-resource-usage", cubin)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Compiled(
        registers=registers, stack=stack, shared=compiled.metadata.shared, sass=_cuobjdump("--dump-sass", cubin)
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run([_CUOBJDUMP, option, cubin], check=True, capture_output=True, text=True).stdout
