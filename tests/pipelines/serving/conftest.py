"""One Ray Serve for all tests of the service: the stub stages at /stub, and the tiny model at / where a test asks."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from ray import serve

from echovideo.training.adapters import Adapter, AdapterCard
from pipelines.identities import Identities, IdentityCard, file_sha256
from pipelines.serving.access import Access
from pipelines.serving.app import PROXY_ENVIRONMENT, bind
from pipelines.serving.config import ServiceConfig
from pipelines.serving.local import free_ports, own_proxy
from pipelines.stages.stage import Stage
from pipelines.storage import StorageOptions

SHAPE = {"size": "96x96", "num_frames": 17, "num_inference_steps": 10}
ENDED = ("completed", "failed")


@dataclass(frozen=True)
class Running:
    """A service that runs: where, with which config, and a client with a key of tenant "studio"."""

    url: str
    config: ServiceConfig
    client: httpx.Client

    @property
    def store(self) -> Path:
        return Path(self.config.store)

    def tenant(self, name: str = "studio") -> Path:
        return self.store / "tenants" / name

    def record(self, video_id: str) -> dict[str, Any]:
        """What the store holds of a request."""
        path = self.tenant() / "runs/on-demand/requests" / f"{video_id}.json"
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def renders(self) -> Counter[str]:
        """How often each row was rendered to its end."""
        logs = self.store.rglob("renders.log")
        return Counter(line.split()[0] for log in logs for line in log.read_text().splitlines())

    def steps(self, row_id: str) -> list[tuple[int, int]]:
        """Each step that was begun for a row, in order, and the process that took it."""
        lines = [line.split() for log in self.store.rglob("steps.log") for line in log.read_text().splitlines()]
        return [(int(step), int(pid)) for name, step, pid in lines if name == row_id]

    def client_of(self, tenant: str, *scopes: str, **limits: int) -> httpx.Client:
        _, text = Access(self.config.store_path).create_key(tenant, scopes or ("read", "render", "admin"), **limits)
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {text}"}, timeout=60)

    def learn(self, name: str, tensors: Mapping[str, torch.Tensor], tenant: str = "studio") -> IdentityCard:
        """Register an identity with a tenant, as training into its output does; its consent is "consent-NAME"."""
        base_digest, consent_id = self.config.model_digest, f"consent-{name}"
        adapter_card = AdapterCard(
            rank=1,
            groups=("fusion",),
            adapted_groups=(),
            base_digest=base_digest,
            licence=self.config.card.licence,
            consent_id=consent_id,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            Adapter(card=adapter_card, tensors=tensors).save(path)
            card = IdentityCard(
                name=name,
                file="adapter.safetensors",
                sha256=file_sha256(path),
                model=self.config.card.name,
                base_digest=base_digest,
                licence=self.config.card.licence,
                consent_id=consent_id,
            )
            return Identities(self.config.tenant_root(tenant)).register(card, path)

    def create(self, photo: bytes, client: httpx.Client | None = None, **fields: Any) -> dict[str, Any]:
        """Ask for a video and return its document."""
        headers = fields.pop("headers", {})
        answer = (client or self.client).post(
            "/v1/videos",
            data={"prompt": "p", **SHAPE, **fields},
            files={"photo": ("photo.png", photo)},
            headers=headers,
        )
        assert answer.status_code == 202, answer.text
        video: dict[str, Any] = answer.json()
        return video

    def view(self, video_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        video: dict[str, Any] = answer.json()
        return video

    @contextmanager
    def occupied(self, photo: bytes) -> Iterator[list[str]]:
        """Give every renderer a video that would never end, yield these in progress, and delete them."""
        fields = {"prompt": "busy", "tags": '{"step_s": "0.3", "ends": "never"}'}
        busy = [self.create(photo, seed=1000 + i, **fields)["id"] for i in range(self.config.num_renderers)]
        try:
            for video_id in busy:
                self.wait(video_id, "in_progress")
            yield busy
        finally:
            self.forget(*busy)

    def forget(self, *video_ids: str) -> None:
        """Delete videos, and with them what they would still cost."""
        for video_id in video_ids:
            self.client.delete(f"/v1/videos/{video_id}")

    def wait(self, video_id: str, *statuses: str, timeout_s: float = 90) -> dict[str, Any]:
        """Return the video once it stands at one of `statuses`, by default once it has ended."""
        wait_until(lambda: self.view(video_id)["status"] in (statuses or ENDED), timeout_s)
        return self.view(video_id)


def wait_until(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def stub_stages() -> Sequence[type[Stage]]:
    from tests.pipelines.stub_stages import STUBS

    return STUBS


@pytest.fixture(scope="package")
def serve_port(s3_options: StorageOptions) -> Iterator[int]:
    """A local Ray with Serve's HTTP proxy on a free port; tests that need another Ray come later, and end this one.

    The S3 server comes first, because its keys must be in the environment of whoever is to use it.
    """
    [port] = free_ports(1)
    # Not pytest's: a socket's path must be short.
    folder = tempfile.TemporaryDirectory(prefix="ev-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": PROXY_ENVIRONMENT | own_proxy(Path(folder.name))},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
    folder.cleanup()


@pytest.fixture(scope="package")
def stub(serve_port: int, stub_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The service with two renderers of stub stages."""
    config = ServiceConfig.of_model(
        str(stub_model),
        store=str(tmp_path_factory.mktemp("service") / "store"),
        num_renderers=2,
        max_queued=40,
        secure_cookies=False,
    )
    serve.run(bind(config, stub_stages), name="stub", route_prefix="/stub")
    yield running(f"http://127.0.0.1:{serve_port}/stub", config)
    if ray.is_initialized():
        serve.delete("stub")


def running(url: str, config: ServiceConfig) -> Running:
    client = Running(url, config, httpx.Client()).client_of("studio", requests_per_minute=100_000, max_active=10_000)
    service = Running(url, config, client)
    wait_until(lambda: client.get("/healthz").status_code == 200)
    return service
