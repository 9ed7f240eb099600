"""The tiny model's folder, in the published layout, face nets included."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from echovideo.faces.recogniser import export_recogniser
from echovideo.model.card import TINY, write_card
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.pipeline import EchoVideoPipeline
from echovideo.tiny import parts

SEED = 20250122


def build_tiny(folder: Path) -> None:
    """Write the tiny model's whole folder, face nets included, from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipeline = EchoVideoPipeline(
            tokenizer=parts.train_tokenizer(),
            text_encoder=parts.fresh_text_encoder(),
            vae=parts.fresh_vae(),
            transformer=EchoVideoTransformer3DModel(parts.tiny_config()).eval(),
            scheduler=parts.scheduler(),
            image_encoder=parts.fresh_image_encoder(),
            image_processor=parts.image_processor(),
        )
    pipeline.save_pretrained(folder)
    (folder / "face_encoder").mkdir()
    export_recogniser(folder / "face_encoder" / "recogniser.onnx")
    write_card(TINY, folder)


def ensure_tiny(models: Path) -> Path:
    """Return the tiny model's folder under `models`, building it there once; safe against a second builder."""
    folder = models / TINY.name
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=models))
    try:
        build_tiny(building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
