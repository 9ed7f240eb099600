"""A run's checkpoints: written beside the training, whole or not at all, and proved by digests before they are read.

    step-00000500/manifest.json    written last: steps, scores, settings, size and sha256 of every other file
    step-00000500/*.distcp         torch.distributed.checkpoint: float32 weights, moments, averages, of all processes
    .step-00000600.writing/        one that is being written, or that nobody lived to finish

A folder is read and written by every process of a run, on several machines too: then it is on a shared file system.
The weights are those that are trained; the others are the base model's, which the manifest names by its digest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from echovideo.errors import EchoVideoError, StorageError, TrainingError
from echovideo.training.optimizer import MasterAdamW
from echovideo.training.parallel import process
from echovideo.training.settings import StageSettings

# It says so even to those who ask for a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

SCHEMA = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is: steps taken, how many of them skipped, of the last ones in a row, the last loss, and scores."""

    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in one folder; made and called by every process of the run alike.

    `base_digest` names the weights that training started from. Raises StorageError, code "disk_full", before writing
    what would not fit; TrainingError for a checkpoint of other settings or of another base.
    """

    def __init__(self, folder: Path, settings: StageSettings, base_digest: str) -> None:
        self.folder = folder
        self._settings = settings
        self._identity = json.loads(json.dumps({"settings": settings.numbers(), "base": base_digest}))
        self._first = process()[0] == 0
        # A group of its own: the threads that write must not mix their messages with those of the training.
        self._group = dist.new_group(backend="gloo") if process()[1] > 1 else None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if self._first:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(".step-*.writing"):
                shutil.rmtree(unfinished)

    def save(self, optimizer: MasterAdamW, progress: Progress) -> None:
        """Copy the state to the CPU's memory and return; the rest is done beside the training.

        Raises what went wrong with the checkpoint before, which is finished first.
        """
        self.wait()
        folder = self._path(progress.steps)
        writing = folder.with_name(f".{folder.name}.writing")
        error = self._begin(optimizer, writing) if self._first else None
        self._agree(error)
        # Given the path and no writer: then torch copies tensors that are already on the CPU, too.
        written = async_save(dict(optimizer.state()), checkpoint_id=writing, **self._among())
        assert isinstance(written, Future)
        self._writing = self._finisher.submit(self._finish, written, writing, folder, progress)

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong on any process, on all of them."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        error = writing.exception()
        if error is not None and not isinstance(error, EchoVideoError):
            traceback.print_exception(error)
            error = StorageError(f"the checkpoint in {self.folder} was not written: {type(error).__name__}: {error}")
        self._agree(error)

    def settle(self) -> None:
        """Return when this process writes nothing any more; what went wrong is raised by the next call."""
        if self._writing is not None:
            futures.wait([self._writing])

    def restore(self, optimizer: MasterAdamW, path: Path | None = None) -> Progress:
        """Fill the optimizer and its model from `path`, or from the last checkpoint that is whole; return its progress.

        Those that are damaged are named on stderr and passed over. Without any, nothing changes.
        """
        self.wait()
        found = [path or _first_whole(sorted(self._finished(), reverse=True))] if self._first else [None]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        if found[0] is None:
            return Progress()
        manifest = _manifest(found[0])
        if manifest["identity"] != self._identity:
            raise TrainingError(
                f"{found[0]} belongs to another run: {_differences(manifest['identity'], self._identity)}. Use its "
                "settings and base, or another folder",
                code="resume",
            )
        load(dict(optimizer.state()), checkpoint_id=found[0], **self._among())
        optimizer.restored()
        return Progress(**manifest["progress"])

    def last(self) -> Path | None:
        """Return the last checkpoint, or None."""
        return max(self._finished(), default=None)

    def best(self) -> Path | None:
        """Return the whole checkpoint with the highest score, the later of equals; without scores, the last one."""
        return _first_whole(sorted(self._finished(), key=_worth, reverse=True))

    def _among(self) -> dict[str, Any]:
        return {"no_dist": True} if self._group is None else {"process_group": self._group}

    def _begin(self, optimizer: MasterAdamW, writing: Path) -> EchoVideoError | None:
        tensors = [t for part in optimizer.state().values() for t in (part.values() if isinstance(part, dict) else [])]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            return _disk_full(self.folder, f"a checkpoint needs {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free")
        try:
            writing.mkdir()
        except OSError as error:
            return StorageError(f"{writing} cannot be made: {error}")
        return None

    def _finish(self, written: Future[Any], writing: Path, folder: Path, progress: Progress) -> None:
        """Wait for all processes' files; the first process then describes them, gives them their place, and tidies."""
        try:
            written.result()
            if not self._first:
                return
            files = {path.name: path for path in sorted(writing.iterdir())}
            with ThreadPoolExecutor() as pool:
                digests = dict(zip(files, pool.map(_digest, files.values()), strict=True))
            manifest = {
                "schema": SCHEMA,
                "progress": asdict(progress),
                "identity": self._identity,
                "files": {name: {"bytes": files[name].stat().st_size, "sha256": digests[name]} for name in files},
            }
            (writing / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            if folder.exists():  # A damaged one that was passed over.
                shutil.rmtree(folder)
            writing.rename(folder)
            finished = sorted(self._finished())
            kept = {*finished[-self._settings.keep_checkpoints :], max(finished, key=_worth)}
            for path in finished:
                if path not in kept:
                    shutil.rmtree(path)
        except BaseException as error:
            shutil.rmtree(writing, ignore_errors=True)
            if os.strerror(errno.ENOSPC) in str(error):
                raise _disk_full(self.folder, "a checkpoint did not fit") from error
            raise

    def _agree(self, error: EchoVideoError | BaseException | None) -> None:
        """Raise the error of the first process that has one, on every process."""
        errors = [error]
        if self._group is not None:
            errors = [None] * process()[1]
            dist.all_gather_object(errors, error, group=self._group)
        for found in errors:
            if found is not None:
                raise found

    def _finished(self) -> list[Path]:
        return list(self.folder.glob("step-*"))

    def _path(self, steps: int) -> Path:
        return self.folder / f"step-{steps:08d}"


def load_weights(model: nn.Module, path: Path) -> Progress:
    """Fill a model's trained parameters from a checkpoint, with the averages if the run kept them.

    The model is a whole one, of any dtype, with the run's adapter layers if it had any; its other parameters stay as
    they are. Needs no torch.distributed. Raises TrainingError for a checkpoint that is damaged.
    """
    problem = damage(path)
    if problem is not None:
        raise TrainingError(f"{path} is damaged: {problem}", code="resume")
    manifest = _manifest(path)
    settings = StageSettings.from_dict(manifest["identity"]["settings"])
    kind = "averages" if settings.average else "masters"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name.removeprefix(f"{kind}.") for name in stored if name.startswith(f"{kind}.")]
    values = {name: torch.empty(model.get_parameter(name).shape) for name in names}
    load({kind: values}, checkpoint_id=path, no_dist=True)
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    return Progress(**manifest["progress"])


def read_progress(path: Path) -> Progress:
    """Return how far a run was at a checkpoint."""
    return Progress(**_manifest(path)["progress"])


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None: every one is read and compared with its digest."""
    try:
        manifest = _manifest(path)
    except TrainingError as error:
        return error.message
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} of {expected['bytes']} bytes"
        if _digest(file) != expected["sha256"]:
            return f"{name} does not have its sha256"
    return None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        if manifest["schema"] == SCHEMA and manifest.keys() >= {"progress", "identity", "files"}:
            return manifest
        problem = f"schema {manifest['schema']}, expected {SCHEMA}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise TrainingError(f"{path / _MANIFEST} cannot be read ({problem})", code="resume")


def _first_whole(paths: Iterable[Path]) -> Path | None:
    for path in paths:
        problem = damage(path)
        if problem is None:
            return path
        print(f"checkpoint {path} is passed over: {problem}", file=sys.stderr, flush=True)
    return None


def _worth(path: Path) -> tuple[float, Path]:
    try:
        return _manifest(path)["progress"]["scores"].get("score", -math.inf), path
    except TrainingError:
        return -math.inf, path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    pairs = {"base": (found["base"], wanted["base"])}
    for name in sorted(found["settings"].keys() | wanted["settings"].keys()):
        pairs[name] = (found["settings"].get(name), wanted["settings"].get(name))
    return ", ".join(f"{name} is {a!r} there and {b!r} here" for name, (a, b) in pairs.items() if a != b)


def _disk_full(folder: Path, what: str) -> StorageError:
    return StorageError(
        f"the disk of {folder} is full: {what}. Free some space and start again: it goes on from the last checkpoint",
        code="disk_full",
    )
