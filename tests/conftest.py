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

SERVICE = Path(__file__).parent / "pipelines/serving"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, one takes all of a file, or of the service: its files share one Ray Serve.

    The service's tests come first: they wait, while the other process computes.
    """
    for item in items:
        group = SERVICE if SERVICE in item.path.parents else item.path
        item.add_marker(pytest.mark.xdist_group(str(group.relative_to(Path(__file__).parent))))
    items.sort(key=lambda item: SERVICE not in item.path.parents)


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
