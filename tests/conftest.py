"""What every room's tests share: the tiny model, built once, and real photographs that packages carry."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import pytest
import skimage.data
import torch
from PIL import Image

from echovideo.tiny.folder import ensure_tiny


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Sums then have the same order on every machine."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return ensure_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def astronaut_png() -> bytes:
    """Eileen Collins, NASA, public domain."""
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def hopper_jpg() -> bytes:
    """Grace Hopper, US Navy, public domain."""
    return (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes()
