"""What this machine has and lacks, check by check."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import onnxruntime
import torch
from av.codec.codec import UnknownCodecError
from huggingface_hub.constants import HF_HUB_CACHE

from echovideo.errors import EchoVideoError
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.parsing import MeshParser
from echovideo.faces.recogniser import load_recogniser
from echovideo.model.card import TINY
from echovideo.tiny.folder import check_tiny, tiny_folder
from echovideo_kernels import dispatch

CheckStatus = Literal["ok", "warning", "missing", "absent"]

_GIB = 2**30
_MIN_FREE_BYTES = 2 * _GIB
_MIN_MEMORY_BYTES = 4 * _GIB
_MIN_SHARED_BYTES = _GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor's table.

    "missing" is needed on this machine, "warning" works with a limit, "absent" is not on this machine and not needed.
    `advice` says what to do, empty where there is nothing to do.
    """

    name: str
    status: CheckStatus
    found: str
    advice: str = ""


def checks(models: Path) -> Iterator[Check]:
    """Yield each check as it is made; `models` is the folder of the tiny model."""
    yield Check(name="Python", status="ok", found=platform.python_version())
    yield Check(name="torch", status="ok", found=f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpus = torch.cuda.is_available()
    yield _gpu()
    yield _onnxruntime(gpus)
    yield _triton(gpus)
    yield from _kernels(gpus)
    for package in ("ray", "prefect"):
        yield Check(name=package.capitalize(), status="ok", found=version(package))
    yield _h264()
    yield _memory()
    yield _shared_memory()
    for name, folder in (
        ("models", models),
        ("hub cache", Path(HF_HUB_CACHE)),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        yield _folder(name, folder.expanduser())
    yield _tiny(models.expanduser())
    yield _face_nets()


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check(
            name="CUDA GPU",
            status="absent",
            found="none: CPU only",
            advice="the tiny model needs none; the published model wants one with 48 GiB or more",
        )
    properties = torch.cuda.get_device_properties(0)
    others = torch.cuda.device_count() - 1
    return Check(
        name="CUDA GPU",
        status="ok",
        found=f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB{f', and {others} more' if others else ''}",
    )


def _onnxruntime(gpus: bool) -> Check:
    providers = onnxruntime.get_available_providers()
    found = f"{onnxruntime.__version__}, {', '.join(name.removesuffix('ExecutionProvider') for name in providers)}"
    if "CUDAExecutionProvider" in providers or not gpus:
        return Check(name="onnxruntime", status="ok", found=found)
    return Check(
        name="onnxruntime",
        status="warning",
        found=found,
        advice="face nets run on the CPU; install onnxruntime-gpu in its place to use the GPU",
    )


def _triton(gpus: bool) -> Check:
    if importlib.util.find_spec("triton"):
        return Check(name="Triton", status="ok", found=version("triton"))
    if gpus:
        return Check(name="Triton", status="missing", found="not installed", advice="pip install triton")
    return Check(name="Triton", status="absent", found="not installed", advice="only GPU kernels need it")


def _kernels(gpus: bool) -> Iterator[Check]:
    if not gpus:
        yield Check(name="kernels", status="absent", found="PyTorch's own: no CUDA GPU")
        return
    major, minor = torch.cuda.get_device_capability(0)
    chip = dispatch.table().get(f"sm_{major}{minor}")
    if chip is None or importlib.util.find_spec("triton") is None:
        reason = "no Triton" if chip else f"none measured on sm_{major}{minor}"
        yield Check(name="kernels", status="warning", found=f"PyTorch's own: {reason}", advice="renders, but slower")
        return
    for operator, settings in chip["operators"].items():
        tuned = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "from_tokens")
        yield Check(
            name=f"kernel {operator}",
            status="ok",
            found=f"from {settings['from_tokens']} tokens; {tuned}, measured on {chip['measured_on']}",
        )


def _h264() -> Check:
    try:
        av.Codec("libx264", "w")
    except UnknownCodecError:
        return Check(
            name="H.264 encoder",
            status="missing",
            found=f"PyAV {av.__version__} without libx264",
            advice="install PyAV from its wheel: pip install --force-reinstall --only-binary av av",
        )
    return Check(name="H.264 encoder", status="ok", found=f"libx264 of PyAV {av.__version__}")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = total >= _MIN_MEMORY_BYTES
    return Check(
        name="memory",
        status="ok" if enough else "warning",
        found=f"{total / _GIB:.1f} GiB, {os.cpu_count()} processors",
        advice="" if enough else "a batch on this machine wants 4 GiB; render single videos instead",
    )


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check(name="/dev/shm", status="absent", found="none", advice="Ray keeps its objects in files instead")
    free = shutil.disk_usage(folder).free
    enough = free >= _MIN_SHARED_BYTES
    return Check(
        name="/dev/shm",
        status="ok" if enough else "warning",
        found=f"{free / _GIB:.1f} GiB free",
        advice="" if enough else "Ray falls back to slow files; in a container, start it with --shm-size=2g",
    )


def _folder(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / _GIB:.1f} GiB free"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(
            name=f"{name} folder", status="missing", found=f"{found}, not writable", advice=f"chown or chmod {existing}"
        )
    if free < _MIN_FREE_BYTES:
        return Check(name=f"{name} folder", status="warning", found=found, advice="free some space")
    return Check(name=f"{name} folder", status="ok", found=found)


def _tiny(models: Path) -> Check:
    folder = tiny_folder(models)
    if not folder.is_dir():
        return Check(
            name="tiny model",
            status="absent",
            found=f"not in {models}",
            advice="built on first use, or by: echovideo models pull tiny",
        )
    try:
        check_tiny(folder)
    except EchoVideoError as error:
        return Check(name="tiny model", status="missing", found=error.message, advice=f"rm -r {folder}")
    return Check(name="tiny model", status="ok", found=f"{folder}, {TINY.name}")


def _face_nets() -> Check:
    loaders: tuple[Callable[[], object], ...] = (MtcnnDetector, load_recogniser, MeshParser)
    try:
        for load in loaders:
            load()
    except EchoVideoError as error:
        return Check(name="face nets", status="missing", found=error.message, advice="pip install --force-reinstall .")
    return Check(name="face nets", status="ok", found="embedded detector, recogniser and parser load")
