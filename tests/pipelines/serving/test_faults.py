"""What killed replicas, restarts, full queues and drains leave: nothing lost, nothing committed twice."""

from __future__ import annotations

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from ray import serve

from tests.pipelines.serving.conftest import SHAPE, Running, wait_until

SLOW = json.dumps({"step_s": "0.2"})


def outcomes_of(stub: Running, video_id: str) -> list[Path]:
    folder = stub.tenant() / "runs/on-demand"
    return [*(folder / "outcomes").glob(f"{video_id}.json"), *(folder / "attempts" / video_id).glob("*.json")]


def dispatcher_of(stub: Running) -> int:
    """The process whose turn it is."""
    newest = max((stub.store / "runs/service/epochs").glob("*.json"), key=lambda path: int(path.stem))
    return int(json.loads(newest.read_text())["pid"])


def claims_of(stub: Running, video_id: str) -> list[dict[str, object]]:
    folder = stub.tenant() / "runs/on-demand/claims" / video_id
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_replica_killed_in_mid_render_leaves_its_video_rendered_once_and_committed_once(
    stub: Running, astronaut_png: bytes
) -> None:
    video_id = stub.create(astronaut_png, seed=300, tags=SLOW)["id"]
    behind = stub.create(astronaut_png, seed=301)["id"]
    wait_until(lambda: len(stub.steps(video_id)) >= 3)
    pid = stub.steps(video_id)[-1][1]
    os.kill(pid, signal.SIGKILL)
    assert stub.wait(video_id)["status"] == "completed"
    assert stub.wait(behind)["status"] == "completed"
    assert (stub.renders()[video_id], stub.renders()[behind]) == (1, 1)
    assert [path.parent.name for path in outcomes_of(stub, video_id)] == ["outcomes"]
    assert [claim["strikes"] for claim in claims_of(stub, video_id)] == [0, 1]
    assert {later for _, later in stub.steps(video_id)} > {pid}


def test_request_that_kills_its_worker_fails_after_three_strikes_and_the_next_one_works(
    stub: Running, astronaut_png: bytes
) -> None:
    killer = stub.create(astronaut_png, seed=310, tags=json.dumps({"kill": "render"}))["id"]
    behind = stub.create(astronaut_png, seed=311)["id"]
    failed = stub.wait(killer, timeout_s=150)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "dead")
    assert failed["error"]["numbers"] == {"strikes": 3}
    assert stub.wait(behind)["status"] == "completed"


def test_dispatcher_killed_with_a_queue_loses_nothing_and_renders_nothing_twice(
    stub: Running, astronaut_png: bytes
) -> None:
    ended = stub.wait(stub.create(astronaut_png, seed=319)["id"])
    running = stub.create(astronaut_png, seed=320, tags=SLOW)["id"]
    queued = [stub.create(astronaut_png, seed=321 + i)["id"] for i in range(5)]
    wait_until(lambda: len(stub.steps(running)) >= 2)
    killed = dispatcher_of(stub)
    os.kill(killed, signal.SIGKILL)

    def answers() -> bool:
        answer = stub.client.get(f"/v1/videos/{running}")
        # While it starts again, callers are told so, and nobody waits for ever.
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    wait_until(lambda: dispatcher_of(stub) != killed)
    wait_until(answers)
    for video_id in (running, *queued):
        assert stub.wait(video_id)["status"] == "completed"
    renders = stub.renders()
    assert {video_id: renders[video_id] for video_id in (running, *queued)} == dict.fromkeys((running, *queued), 1)
    assert stub.view(ended["id"]) == ended
    assert all(len(outcomes_of(stub, video_id)) == 1 for video_id in (running, *queued))


def test_client_that_hangs_up_leaves_others_their_answer_of_the_same_call(stub: Running) -> None:
    host, port = stub.url.split("/")[2].split(":")
    path, key = "/v1/videos/video_" + "0" * 24, stub.client.headers["Authorization"]
    pid = dispatcher_of(stub)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        with socket.create_connection((host, int(port)), 30) as first:
            first.sendall(f"GET /stub{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n".encode())
            # What the ingress answers by itself comes after what it was asked before.
            stub.client.get("/v1/session")
            other = pool.submit(stub.client.get, path)
            stub.client.get("/v1/session")
        stub.client.get("/v1/session")
        os.kill(pid, signal.SIGCONT)
        assert other.result().status_code == 404


def test_full_queue_is_answered_429_and_drains_without_loss(stub: Running, astronaut_png: bytes) -> None:
    accepted, refused = [], 0
    with stub.occupied(astronaut_png):
        for _ in range(stub.config.max_queued + 10):
            answer = stub.client.post(
                "/v1/videos", data={"prompt": "p", **SHAPE, "seed": 330}, files={"photo": ("p.png", astronaut_png)}
            )
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])
                continue
            refused += 1
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
    assert refused == 10
    assert len(accepted) == stub.config.max_queued
    assert {stub.wait(video_id)["status"] for video_id in accepted} == {"completed"}
    # They all asked for the same pixels: two renderers may have begun with them at once.
    assert 1 <= sum(stub.renders()[video_id] for video_id in accepted) <= 2


def test_drained_dispatcher_finishes_what_runs_and_the_next_one_takes_up_the_rest(
    stub: Running, astronaut_png: bytes
) -> None:
    running = stub.create(astronaut_png, seed=340, tags=SLOW)["id"]
    busy = stub.create(astronaut_png, seed=342, tags=SLOW)["id"]
    queued = stub.create(astronaut_png, seed=341)["id"]
    wait_until(lambda: len(stub.steps(running)) >= 1 and len(stub.steps(busy)) >= 1)
    dispatcher = serve.get_deployment_handle("Dispatcher", "stub")
    dispatcher.drain.remote().result(timeout_s=60)
    assert (stub.renders()[running], stub.renders()[busy]) == (1, 1)
    assert stub.steps(queued) == []
    assert stub.client.get("/healthz").status_code == 503
    finished = sorted((stub.tenant() / "runs/on-demand/epochs").glob("*.finished"))
    assert finished != []
    os.kill(dispatcher_of(stub), signal.SIGKILL)
    wait_until(lambda: _status(stub, "/healthz") == 200)
    assert stub.wait(queued)["status"] == "completed"
    assert stub.view(running)["status"] == "completed"


def _status(stub: Running, path: str) -> int:
    try:
        return stub.client.get(path).status_code
    except httpx.TransportError:
        return 0
