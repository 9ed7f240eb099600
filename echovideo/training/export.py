"""What training made, as files that rendering reads: a model folder, or an adapter of one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from echovideo.errors import StorageError
from echovideo.model.card import read_card, write_card
from echovideo.model.folder import load_transformer, save_transformer
from echovideo.training.adapters import Adapter, add_adapter
from echovideo.training.checkpoint import load_weights
from echovideo.training.settings import StageSettings


def export_model(checkpoint: Path, base: Path, folder: Path, *, name: str, dtype: torch.dtype) -> None:
    """Write a whole model folder: the base's, with the checkpoint's transformer and a card under `name`.

    The base's licence goes on. Raises StorageError if the folder is there, and what reading the two raises.
    """
    if folder.exists():
        raise StorageError(f"{folder} is there already; choose another folder for {name}")
    model = load_transformer(base, dtype=dtype)
    load_weights(model, checkpoint)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.copytree(base, writing, ignore=lambda place, _: ["transformer"] if Path(place) == base else [])
    save_transformer(model, writing)
    write_card(replace(read_card(base), name=name), writing)
    writing.rename(folder)


def export_adapter(
    checkpoint: Path,
    base: Path,
    path: Path,
    settings: StageSettings,
    *,
    base_digest: str,
    consent_id: str | None,
    dtype: torch.dtype,
) -> Adapter:
    """Write the checkpoint's adapter to `path` under the base's licence and return it."""
    assert settings.adapter is not None
    model = load_transformer(base, dtype=dtype)
    add_adapter(model, settings.adapter, settings.seed)
    load_weights(model, checkpoint)
    adapter = Adapter.of(
        model, settings, base_digest=base_digest, licence=read_card(base).licence, consent_id=consent_id
    )
    adapter.save(path)
    return adapter
