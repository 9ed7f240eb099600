"""Fixtures: a real S3 server, an empty folder or prefix for each test, a Ray, a model of stubs, and a real browser."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch
from playwright.sync_api import Browser, sync_playwright
from ray import serve

from echovideo.conditioning import Condition
from echovideo.errors import StorageError
from echovideo.faces.analyzer import FaceAnalyzer
from echovideo.faces.packs import open_pack
from echovideo.model.card import ModelCard, write_card
from echovideo.model.config import TransformerConfig
from pipelines.storage import StorageOptions, StoragePath

START_SCRIPT = Path(__file__).parents[2] / "infra/local_s3/start.sh"
START_DEADLINE_S = 60
CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def s3_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageOptions]:
    """SeaweedFS, started by infra/local_s3/start.sh on free ports, with its keys in the environment."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "echo")
        patch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(16))
        patch.delenv("AWS_PROFILE", raising=False)
        port = _free_base_port()
        options = StorageOptions(endpoint_url=f"http://127.0.0.1:{port}")
        with (folder / "log").open("wb") as log:
            command = [str(START_SCRIPT), str(folder / "data"), str(port)]
            # The server's program comes with the virtual environment, which need not be activated.
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            server = subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(server, StoragePath.parse("s3://echovideo/ready", options), folder / "log")
            yield options
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def ray_of_two_cpus(s3_options: StorageOptions) -> Iterator[None]:
    """One local Ray for all that takes it, started once the S3 server's keys are in the environment."""
    if ray.is_initialized():  # The service's, whose tests come first.
        serve.shutdown()
        ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def stub_model(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, astronaut_png: bytes) -> Path:
    """A model folder for the stub stages: real face nets, one identity, one condition, and a card that says judged."""
    folder = tmp_path_factory.mktemp("stub") / "model"
    shutil.copytree(tiny_folder / "face_encoder", folder / "face_encoder")
    write_card(ModelCard(name="stub", licence="none"), folder)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(TransformerConfig().to_dict()))
    identity = FaceAnalyzer(open_pack(folder / "face_encoder")).analyze(astronaut_png)
    (folder / "identity.safetensors").write_bytes(identity.to_bytes())
    mean, std = torch.zeros(16, 12, 12), torch.ones(16, 12, 12)
    condition = Condition(fused_2ND=torch.zeros(2, 226, 8), face_mean_CHW=mean, face_std_CHW=std)
    (folder / "condition.safetensors").write_bytes(condition.to_bytes())
    return folder


@pytest.fixture
def s3_root(s3_options: StorageOptions) -> StoragePath:
    """An empty prefix of the session's S3 server."""
    return StoragePath.parse(f"s3://echovideo/{secrets.token_hex(8)}", s3_options)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty local folder, and an empty S3 prefix: a test that takes it runs on both."""
    if request.param == "local":
        return StoragePath.parse(str(tmp_path / "root"))
    s3_root: StoragePath = request.getfixturevalue("s3_root")
    return s3_root


def _free_base_port() -> int:
    for base in random.sample(range(12000, 30000, 10), 1000):
        if all(_is_free(port) for first in (base, base + 10000) for port in range(first, first + 5)):
            return base
    raise AssertionError("no ten free ports")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _wait_until_ready(server: subprocess.Popen[bytes], probe: StoragePath, log: Path) -> None:
    port = int((probe.options.endpoint_url or "").rsplit(":", 1)[1])
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and server.poll() is None:
        if not _is_free(port):
            try:
                probe.write_bytes(b"")
                return
            except StorageError:
                pass
        time.sleep(0.1)
    raise AssertionError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: install Debian's chromium to run this test")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
