"""Models by name: the embedded tiny model, a folder, or a repository fetched from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from echovideo.errors import WeightsError
from echovideo.model.card import PUBLISHED_LICENCE, PUBLISHED_MODEL, resolve_folder
from echovideo.tiny.folder import ensure_tiny
from pipelines.resources import check_disk

TINY_NAME = "tiny"

LICENCE_NOTE = (
    f"{PUBLISHED_MODEL} is under {PUBLISHED_LICENCE}: non-commercial use only, with attribution.\n"
    "Its face nets, antelopev2, are InsightFace's: for non-commercial research only.\n"
    "EchoVideo's own code is Apache-2.0; these terms are the weights' and bind whoever uses them."
)

_HUB = "https://huggingface.co/"


def find_model(model: str, models: Path) -> Path:
    """Return the folder of "tiny" (built under `models` once), of a local path, or of a hub model fetched before.

    Fetches nothing, so that nobody gets 40 GB and a licence by surprise. Raises WeightsError.
    """
    if model == TINY_NAME:
        return ensure_tiny(models.expanduser()).resolve()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    name = hub_name(model)
    if name is None:
        raise WeightsError(f"there is no model folder {model}; give a folder, {TINY_NAME!r} or a hub name, owner/name")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{name} is not on this machine; fetch it first with: echovideo models pull {name}", code="model_not_pulled"
        ) from error


def hub_name(model: str) -> str | None:
    """Return "owner/name" of a hub name or its https://huggingface.co address, None if it is neither."""
    name = model.removeprefix(_HUB).strip("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name else None


def hub_size(name: str) -> int:
    """Return the bytes that fetching a hub repository may take, what is here already left out; raises WeightsError."""
    try:
        files = snapshot_download(name, dry_run=True)
    except OSError as error:
        raise WeightsError(
            f"the hub could not be asked about {name}: {error}; check the name and this machine's network",
            code="hub_unreachable",
        ) from error
    return sum(file.file_size or 0 for file in files if file.will_download)


def fetch(name: str, num_bytes: int) -> Path:
    """Fetch a hub repository of so many bytes into the hub's cache and return its folder.

    Raises RunError `too_little_disk` before any byte is fetched, WeightsError.
    """
    check_disk(Path(HF_HUB_CACHE), num_bytes)
    return resolve_folder(name)
