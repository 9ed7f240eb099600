"""What a dispatcher does with work that another one left in a renderer's hands."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from ray.exceptions import RayActorError

from echovideo.errors import RequestError
from echovideo.request import RenderRequest
from pipelines.ledger import StaleDriverError
from pipelines.outcome import Cancelled
from pipelines.serving.access import Access
from pipelines.serving.config import ON_DEMAND, ServiceConfig
from pipelines.serving.dispatcher import Dispatcher
from pipelines.serving.records import TenantStore, VideoRecord, new_video_id

NOBODY: Any = None


@pytest.fixture
def config(stub_model: Path, tmp_path: Path) -> ServiceConfig:
    return replace(ServiceConfig.of_model(str(stub_model), store=str(tmp_path / "store")), num_renderers=0)


def record_of(video_id: str) -> VideoRecord:
    request = RenderRequest(row_id=video_id, photo_uri="uploads/0.jpg", prompt="p")
    return VideoRecord(tenant="studio", key_id="k", created_at=0.0, request=request, photo_sha256="0" * 64, nonce="n")


def test_request_of_a_client_that_hangs_up_is_listed_and_can_be_deleted(
    config: ServiceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.serving.dispatcher._PURGE_AGAIN_S", 0.01)
    store, video_id = TenantStore(config, "studio"), new_video_id("studio", "first")
    key, _ = Access(config.store_path).create_key("studio", ["render"])
    # It is lost at first.
    faces = Mock(nets=Mock(remote=AsyncMock(side_effect=[RayActorError(), "nets"])))

    async def hang_up_and_delete() -> None:
        dispatcher = Dispatcher(config, NOBODY, faces)
        while not dispatcher.ready:
            await asyncio.sleep(0.01)
        call = asyncio.create_task(dispatcher.accept(record_of(video_id), key, b"photo"))
        await asyncio.sleep(0)
        call.cancel()
        async with asyncio.timeout(30):
            while not await dispatcher.delete("studio", video_id):
                await asyncio.sleep(0.01)
            while store.removed_path(video_id).exists():
                await asyncio.sleep(0.01)
        dispatcher.check_health()
        assert not store.upload_path("0" * 64).exists()
        await dispatcher.drain()

    asyncio.run(hang_up_and_delete())


def test_request_without_consent_or_whose_photo_has_gone_is_not_accepted(config: ServiceConfig) -> None:
    record = record_of(new_video_id("studio", None))
    for strict, code in ((True, "consent_missing"), (False, "not_found")):
        store = TenantStore(replace(config, require_consent=strict), "studio")
        with pytest.raises(RequestError) as refused:
            store.accept(record, None)
        assert refused.value.code == code
    assert store.ledger.folder.list_files() == []


def test_dispatcher_after_a_lost_one_refuses_what_its_renderer_still_commits(config: ServiceConfig) -> None:
    store, video_id = TenantStore(config, "studio"), new_video_id("studio", "first")
    store.accept(record_of(video_id), b"photo")
    # It was lost before it had written the request that this is of.
    store.upload_path("1" * 64).write_bytes(b"photo")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lost:
        old = store.ledger.open_epoch(pid=lost.pid).number
        store.ledger.claim(video_id, old, "service", "node", lambda node: True)
        lost.kill()
    name = ("studio", ON_DEMAND, video_id)

    async def take_over() -> None:
        dispatcher = Dispatcher(config, NOBODY, NOBODY)
        # Without a turn of its own it stops nobody: what is committed then still counts.
        assert await dispatcher.report(name, old, 3, 10, None)
        while not dispatcher.ready:
            await asyncio.sleep(0.01)
        assert not await dispatcher.report(name, old, 4, 10, None)
        [(_, view, _)] = await dispatcher.find([("studio", video_id)])
        assert view["status"] == "queued"
        assert (store.ledger.folder / "uploads").list_names() == [f"{'0' * 64}.jpg"]
        await dispatcher.drain()

    asyncio.run(take_over())
    with pytest.raises(StaleDriverError):
        store.ledger.commit(Cancelled(row_id=video_id, attempt=1), old)
