"""The tiny model's folder, in the published layout, face nets included."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from echovideo.errors import WeightsError
from echovideo.model.card import TINY, folder_digest, write_card

WEIGHTS = Path(__file__).parent / "weights"
"""The trained weights that travel with the package."""
# Hidden, so that it is no part of the folder's own digest.
_DIGEST = ".digest"


def build_tiny(folder: Path) -> None:
    """Write the tiny model's whole folder from the shipped weights, face nets included."""
    # Seconds of imports, which a command that finds the folder built need not wait for.
    from echovideo.faces.recogniser import export_recogniser
    from echovideo.pipeline import EchoVideoPipeline
    from echovideo.tiny import parts, shipped

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


def tiny_folder(models: Path) -> Path:
    """Return where the tiny model of the shipped weights lies under `models`, or will: other weights lie elsewhere."""
    return models / f"{TINY.name}-{folder_digest(WEIGHTS)[:8]}"


def check_tiny(folder: Path) -> None:
    """Raise WeightsError unless every byte of a tiny model's folder is as it was built."""
    digest = folder / _DIGEST
    if not digest.is_file() or digest.read_bytes() != folder_digest(folder).encode():
        raise WeightsError(f"the tiny model in {folder} is damaged; delete that folder, and it is built again")


def ensure_tiny(models: Path) -> Path:
    """Return the tiny model's folder under `models`, building it there once; safe against a second builder.

    Raises WeightsError where it is there and damaged.
    """
    folder = tiny_folder(models)
    if not folder.is_dir():
        models.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=models))
        try:
            build_tiny(building)
            (building / _DIGEST).write_text(folder_digest(building))
            building.chmod(0o755)
            try:
                building.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    check_tiny(folder)
    return folder
