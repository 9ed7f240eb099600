"""What every room's tests share: the tiny model, built once, and real photographs that packages carry."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import pytest
import skimage.data
import torch
from PIL import Image
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from echovideo.tiny.folder import ensure_tiny

SERVICE = "tests/pipelines/serving/"


class ByFile(LoadScopeScheduling):
    """Gives each of the test processes whole files, and the service's files as one: they share one Ray Serve."""

    def _split_scope(self, nodeid: str) -> str:
        return SERVICE if nodeid.startswith(SERVICE) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Share the tests among the processes of `pytest -n`."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the service's tests: they wait, while the other process computes."""
    items.sort(key=lambda item: not item.nodeid.startswith(SERVICE))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Sums then have the same order on every machine, and no thread of a busy machine waits for another.

    What renders sets its own number, which stays; so each file begins with one again.
    """
    torch.set_num_threads(1)


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
