"""What the flow tests share: one tiny model, photos, manifests, a Prefect server, and the command line as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.request import urlopen

import matplotlib
import pytest
import skimage.data
from PIL import Image

from echovideo.request import RenderRequest
from echovideo.tiny.folder import ensure_tiny
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
ECHOVIDEO = [sys.executable, "-c", "from flows.cli import main; main()"]


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = 180) -> T:
    """Return what `look` finds once it is truthy."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
    return found


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its own session, and all it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A finished command: its exit status, stdout's JSON document, and stderr."""

    status: int
    document: dict[str, Any]
    stderr: str


class Running:
    """An `echovideo ... --json` process in a session of its own, as a shell would start it."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [*ECHOVIDEO, *arguments, "--json"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Press Ctrl-C: the whole foreground group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> Command:
        """Wait for the process and return how it ended."""
        stdout, stderr = self.process.communicate(timeout=240)
        assert stdout, stderr
        return Command(status=self.process.returncode, document=json.loads(stdout), stderr=stderr)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with astronaut.png, admiral.jpg and coffee.png, which shows nobody."""
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "coffee.png")
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    (folder / "admiral.jpg").write_bytes(hopper.read_bytes())
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder, with the tiny model in it."""
    folder = tmp_path_factory.mktemp("models")
    ensure_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def environment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A process's environment without any Prefect server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    home = tmp_path_factory.mktemp("prefect")
    return kept | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "ECHOVIDEO_MODELS": str(models),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="session")
def with_server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that uses a real Prefect server, which runs as long as the tests do."""
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    log = tmp_path_factory.mktemp("server") / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def healthy() -> bool:
        try:
            with urlopen(f"{api}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    try:
        wait_for(healthy, "the Prefect server")
        yield environment | {"PREFECT_API_URL": api}
    finally:
        end_group(server)


def make_manifest(
    path: Path, photos: Path, rows: dict[str, str], *, steps: int = 2, quick: str | None = None, num_frames: int = 9
) -> Path:
    """Write a manifest of 96x96 rows, {row id: photo's name}, seeded from 0; the row `quick` has two steps."""
    write_manifest(
        [
            RenderRequest(
                row_id=row_id,
                prompt="A person waves",
                photo_uri=str(photos / photo),
                seed=seed,
                height=96,
                width=96,
                num_frames=num_frames,
                num_inference_steps=2 if row_id == quick else steps,
            )
            for seed, (row_id, photo) in enumerate(rows.items())
        ],
        StoragePath.parse(str(path)),
    )
    return path
