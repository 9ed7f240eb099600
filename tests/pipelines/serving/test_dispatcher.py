"""What a dispatcher does with work that another one left in a renderer's hands."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echovideo.request import RenderRequest
from pipelines.ledger import StaleDriverError
from pipelines.outcome import Cancelled
from pipelines.serving.config import ON_DEMAND, ServiceConfig
from pipelines.serving.dispatcher import Dispatcher
from pipelines.serving.records import TenantStore, VideoRecord, new_video_id


def test_dispatcher_after_a_lost_one_refuses_what_its_renderer_still_commits(stub_model: Path, tmp_path: Path) -> None:
    config = replace(ServiceConfig.of_model(str(stub_model), store=str(tmp_path / "store")), num_renderers=0)
    store, video_id = TenantStore(config, "studio"), new_video_id("studio", "first")
    request = RenderRequest(row_id=video_id, photo_uri="uploads/0.jpg", prompt="p")
    record = VideoRecord(tenant="studio", key_id="k", created_at=0.0, request=request, photo_sha256="0" * 64, nonce="n")
    store.accept(record, b"photo")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lost:
        old = store.ledger.open_epoch(pid=lost.pid).number
        store.ledger.claim(video_id, old, "service", "node", lambda node: True)
        lost.kill()
    name = ("studio", ON_DEMAND, video_id)
    nobody: Any = None

    async def take_over() -> None:
        dispatcher = Dispatcher(config, nobody, nobody)
        # Without a turn of its own it stops nobody: what is committed then still counts.
        assert await dispatcher.report(name, old, 3, 10, None)
        while not dispatcher.ready:
            await asyncio.sleep(0.01)
        assert not await dispatcher.report(name, old, 4, 10, None)
        [(_, view, _)] = await dispatcher.find([("studio", video_id)])
        assert view["status"] == "queued"
        await dispatcher.drain()

    asyncio.run(take_over())
    with pytest.raises(StaleDriverError):
        store.ledger.commit(Cancelled(row_id=video_id, attempt=1), old)
