"""The load, for locust: whoever makes videos, polls them, watches them, or asks for many at once.

What they need is in a JSON file, `--plan`: `key` (an API key's text), `photos` (a folder of JPEGs), `videos` (ids that
there are), `count` (how many videos are made before all stops) and `made` (where their ids are then written).
"""

from __future__ import annotations

import itertools
import json
import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, between, constant_pacing, events, task
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from urllib3.filepost import encode_multipart_formdata

from echovideo.request import DEFAULT_SEED

_RETRY_S = 0.5
_SHAPE = {"size": "96x96", "num_frames": 9}
_plan: dict[str, Any] = {}
_photos: list[bytes] = []
_numbers = itertools.count()
_made: list[str] = []


def add_arguments(parser: ArgumentParser) -> None:
    """Take the plan's path."""
    parser.add_argument("--plan", required=True)


def read_plan(environment: Environment, **_: Any) -> None:
    """Read the plan, and the photos before any clock runs."""
    assert environment.parsed_options is not None
    _plan.update(json.loads(Path(environment.parsed_options.plan).read_text()))
    if "photos" in _plan:
        _photos.extend(path.read_bytes() for path in sorted(Path(_plan["photos"]).iterdir()))


def write_made(environment: Environment, **_: Any) -> None:
    """Say which videos were accepted."""
    if "made" in _plan:
        Path(_plan["made"]).write_text(json.dumps(_made))


class _Client(FastHttpUser):
    """Somebody with the plan's key."""

    abstract = True
    network_timeout = connection_timeout = 60.0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {_plan['key']}"}

    def begin_at_random(self, within_s: float) -> None:
        """Spread the users, who are all started at once, over the time that each waits between two requests."""
        time.sleep(random.random() * within_s)

    def next_number(self) -> int | None:
        """Return the number of the next video to be made, None when there are enough: then all of it stops."""
        number = next(_numbers)
        if number < _plan["count"]:
            return number
        runner = self.environment.runner
        if len(_made) >= _plan["count"] and runner is not None:
            # Not here: it ends this user too, and would end with it.
            gevent.spawn(runner.quit)
        time.sleep(_RETRY_S)
        return None

    def create(self, number: int, settings: dict[str, Any], headers: dict[str, str] | None = None) -> bool:
        """Upload a photo of its own with a prompt."""
        photo = _photos[number % len(_photos)]
        fields = {"prompt": "she waves", **_SHAPE, "seed": number, **settings}
        parts = [(name, str(value)) for name, value in fields.items()]
        body, kind = encode_multipart_formdata([*parts, ("photo", ("photo.jpg", photo, "image/jpeg"))])
        asked = {**self.headers, "Content-Type": kind, **(headers or {})}
        # It takes bytes too, whatever its annotation says.
        upload: Any = body
        with self.client.post("/v1/videos", data=upload, headers=asked, name="create", catch_response=True) as answer:
            return accepted(answer)

    def remix(self, seed: int, headers: dict[str, str] | None = None) -> bool:
        """Ask for another take of one of the plan's videos."""
        video_id, asked = random.choice(_plan["videos"]), {"prompt": "she waves", "seed": seed}
        with self.client.post(
            f"/v1/videos/{video_id}/remix",
            json=asked,
            headers={**self.headers, **(headers or {})},
            name="remix",
            catch_response=True,
        ) as answer:
            return accepted(answer)


class Maker(_Client):
    """Uploads a photo about every second; on the second, one stall would let all users fire together ever after."""

    wait_time = between(0, 2)

    def on_start(self) -> None:
        self.begin_at_random(1)

    @task
    def make(self) -> None:
        """Ask for a video that keeps the stub for a second."""
        self.create(next(_numbers), {"num_inference_steps": 10, "tags": '{"step_s": "0.1"}'})


class Poller(_Client):
    """Asks about every five seconds how its video stands; locust's own pacing would let all of them ask at once."""

    wait_time = between(4, 6)

    def on_start(self) -> None:
        self.video_id = _plan["videos"][next(_numbers) % len(_plan["videos"])]
        self.begin_at_random(5)

    @task
    def poll(self) -> None:
        """Ask once."""
        self.client.get(f"/v1/videos/{self.video_id}", headers=self.headers, name="poll")


class Watcher(_Client):
    """Follows a video's events for as long as there are any."""

    def on_start(self) -> None:
        self.video_id = _plan["videos"][next(_numbers) % len(_plan["videos"])]
        self.begin_at_random(5)

    @task
    def watch(self) -> None:
        """Hold the stream; its response time is that of the first event."""
        started, waiting = time.perf_counter(), True
        path = f"/v1/videos/{self.video_id}/events"
        with self.client.get(path, headers=self.headers, name="watch", stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            while line := answer.stream.readline(b"\n"):
                if line.startswith(b"event: "):
                    self.environment.events.request.fire(
                        request_type="SSE",
                        name="first event" if waiting else "event",
                        response_time=(time.perf_counter() - started) * 1000 if waiting else 0.0,
                        response_length=len(line),
                        exception=None,
                        context={},
                    )
                    waiting = False
            answer.failure("the stream ended before its video did")


class Remixer(_Client):
    """Asks for as many videos as the plan says, one after the other, all of the same pixels."""

    @task
    def ask(self) -> None:
        """Ask for the next one."""
        if self.next_number() is not None:
            self.remix(DEFAULT_SEED)


class Mixer(_Client):
    """Asks for videos of all kinds, and asks again with the same Idempotency-Key until each is accepted."""

    wait_time = constant_pacing(1)

    @task
    def ask(self) -> None:
        """Ask for the next one: one in four is a remix, one in twenty fails in the stub."""
        number = self.next_number()
        if number is None:
            return
        headers = {"Idempotency-Key": f"mixed-{number}"}
        tags = {"step_s": "0.02", **({"raise": "1"} if number % 20 == 0 else {})}
        settings = {"num_inference_steps": 5 + number % 15, "tags": json.dumps(tags)}
        while not (self.remix(number, headers) if number % 4 == 1 else self.create(number, settings, headers)):
            time.sleep(_RETRY_S)


def accepted(answer: ResponseContextManager) -> bool:
    """Note the video of a 202; anything else is a failure."""
    if answer.status_code == 202:
        _made.append(answer.json()["id"])
        return True
    answer.failure(f"status {answer.status_code}: {(answer.text or '')[:200]}")
    return False


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(read_plan)
events.quitting.add_listener(write_made)
