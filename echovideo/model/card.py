"""A model folder as a whole: where it lies, what must be said of it, and the digest that stands for it."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from echovideo.errors import WeightsError
from echovideo.model.config import read_json

PUBLISHED_MODEL = "bytedance-research/EchoVideo"
PUBLISHED_LICENCE = "CC BY-NC 4.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What must be said of a model wherever its videos go; a folder without a card is the published model.

    `notice` says in a sentence or two what its videos are not. A model that is not `judged` does not draw faces that
    can be told apart: its videos are not compared with the photo.
    """

    name: str = "EchoVideo-5B"
    licence: str = PUBLISHED_LICENCE
    judged: bool = True
    notice: str = ""


TINY = ModelCard(
    name="tiny-4",
    licence="Apache-2.0",
    notice="This small model knows only a drawn world. Drawn people keep something of their faces in its videos; real "
    "people keep only their skin tone, about.",
)
"""The embedded model; its number is raised with every change of its weights."""


def read_card(folder: Path) -> ModelCard:
    """Return the folder's model card; raises WeightsError for one that this release cannot read."""
    path = folder / "model_card.json"
    try:
        return ModelCard(**read_json(path)) if path.is_file() else ModelCard()
    except TypeError as error:
        raise WeightsError(f"{path} is no model card of this release: {error}") from None


def write_card(card: ModelCard, folder: Path) -> None:
    """Write the folder's model card."""
    (folder / "model_card.json").write_text(json.dumps(asdict(card), indent=1) + "\n")


def resolve_folder(folder_or_hub_id: str | Path) -> Path:
    """Return the local folder, fetching a "owner/name" repository from the Hugging Face Hub; raises WeightsError."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightsError(f"there is no model folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.onnx", "*.pth"]))
    except (OSError, HFValidationError) as error:
        raise WeightsError(f"{name} is no local folder, and could not be fetched from the hub: {error}") from error


def folder_digest(folder: Path) -> str:
    """Return the sha256 of a model folder: every file's path and content, hidden files and folders left out."""
    names = sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for name in [path.relative_to(folder).as_posix()]
    )
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _file_digest(folder / name), names))
    whole = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
