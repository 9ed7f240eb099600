"""The service on this machine, from the command line: start, say how to reach it, drain at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from pipelines.serving.access import Access
from pipelines.serving.config import ServiceConfig
from pipelines.serving.local import LocalService

TENANT = "local"
_NO_LIMIT = 1_000_000


def serve_here(config: ServiceConfig, host: str, port: int, out: Console, err: Console) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs; a second one ends at once."""
    asked_to_stop = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if asked_to_stop.is_set():
            raise KeyboardInterrupt
        asked_to_stop.set()

    with err.status("starting Ray") as status:
        service = LocalService(config, host, port)
        earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            service.wait_until_answering(status.update)
            for line in _ways_in(Access(config.store_path), service.url):
                out.print(line)
            service.wait_until_ready(status.update)
            status.update("ready; Ctrl-C finishes what runs and stops")
            while not asked_to_stop.wait(0.5):
                pass
            status.update("finishing what runs; Ctrl-C again ends at once")
            service.drain()
        finally:
            service.stop()
            for number, handler in earlier.items():
                signal.signal(number, handler)


def _ways_in(access: Access, url: str) -> Iterator[str]:
    """Yield lines that say the address, a sign-in link, and, the first time, an API key."""
    yield f"API      {url}/v1, described by {url}/openapi.json"
    keys = [key for key in access.list_keys() if key.tenant == TENANT]
    if keys:
        key = keys[0]
        yield "key      the one shown at the first start; `echovideo keys create` makes another"
    else:
        key, text = access.create_key(
            TENANT, ("read", "render", "admin"), requests_per_minute=_NO_LIMIT, max_active=_NO_LIMIT
        )
        yield f"key      {text} (shown this once)"
    token, _ = access.create_link(key.key_id)
    yield f"sign in  {url}/sign-in?token={token} (good once, for 15 minutes)"
