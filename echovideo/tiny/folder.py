"""The tiny model's folder, in the published layout, face nets included."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from echovideo.faces.recogniser import export_recogniser
from echovideo.model.card import TINY, write_card
from echovideo.pipeline import EchoVideoPipeline
from echovideo.tiny import parts, shipped


def build_tiny(folder: Path) -> None:
    """Write the tiny model's whole folder from the shipped weights, face nets included."""
    pipeline = EchoVideoPipeline(
        tokenizer=shipped.load_tokenizer(),
        text_encoder=shipped.load_text_encoder().bfloat16().eval(),
        vae=shipped.load_vae().bfloat16().eval(),
        transformer=shipped.load_transformer().bfloat16().eval(),
        scheduler=parts.scheduler(),
        image_encoder=shipped.load_image_encoder().bfloat16().eval(),
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
