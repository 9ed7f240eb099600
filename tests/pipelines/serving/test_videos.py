"""Single requests over HTTP, against a real Serve with stub stages."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import openai
import pytest
from PIL import Image

from echovideo.video import decode_mp4
from pipelines.serving.api.bodies import MAX_BODY_BYTES
from pipelines.serving.api.videos import watch_video
from pipelines.serving.photos import clean_photo
from tests.pipelines.serving.conftest import SHAPE, Running, wait_until
from tests.pipelines.serving.test_photos import secretive

SLOW = json.dumps({"step_s": "0.3"})


@pytest.fixture(scope="module")
def done(stub: Running, astronaut_png: bytes) -> dict[str, object]:
    """A video that has been made, with its content."""
    video = stub.wait(stub.create(astronaut_png, seed=1, prompt="she waves", consent_id="c-1")["id"])
    assert video["status"] == "completed", video
    return video


def content(stub: Running, video: dict[str, object], **headers: str) -> httpx.Response:
    return stub.client.get(f"/v1/videos/{video['id']}/content", headers=headers)


def files_below(folder: Path) -> list[str]:
    """Return all files; folders that are being deleted are no error here, as they are to Path.rglob."""
    return [f"{below}/{name}" for below, _, names in os.walk(folder) for name in names]


def files_of(stub: Running, video_id: str) -> list[str]:
    return [path for path in files_below(stub.tenant()) if video_id in path]


@pytest.fixture
def client(stub: Running) -> openai.OpenAI:
    key = stub.client.headers["Authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url=f"{stub.url}/v1", api_key=key, max_retries=0)


def test_openai_client_creates_polls_lists_downloads_remixes_and_deletes(
    stub: Running, client: openai.OpenAI, astronaut_png: bytes
) -> None:
    with warnings.catch_warnings():
        # The client warns that another company's service has ended.
        warnings.simplefilter("ignore", DeprecationWarning)
        made = client.videos.create(
            prompt="she waves",
            input_reference=("photo.png", astronaut_png),
            size="96x96",  # type: ignore[arg-type]
            seconds="1",  # type: ignore[arg-type]
            extra_body={"seed": 7, "num_inference_steps": 10, "consent_id": "c-7", "tags": {"take": "first"}},
        )
        assert made.status == "queued"
        ended = client.videos.poll(made.id, poll_interval_ms=50)
        assert (ended.status, ended.progress, ended.seconds, ended.size) == ("completed", 100, "1.0625", "96x96")
        assert stub.record(made.id)["request"]["tags"] == {"take": "first"}
        mp4 = client.videos.download_content(made.id).read()
        assert decode_mp4(mp4).shape == (17, 96, 96, 3)
        assert client.videos.download_content(made.id, variant="thumbnail").read()[:3] == b"\xff\xd8\xff"

        remixed = client.videos.poll(client.videos.remix(made.id, prompt="she dances").id, poll_interval_ms=50)
        assert (remixed.status, remixed.prompt) == ("completed", "she dances")
        assert remixed.remixed_from_video_id == made.id

        newest = [video.id for video in client.videos.list(limit=1)][:2]
        assert newest == [remixed.id, made.id]
        for video in (remixed, made):
            assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(made.id)


def test_video_document_says_what_was_asked_and_its_record_how_it_was_made(
    stub: Running, done: dict[str, object]
) -> None:
    assert done["object"] == "video"
    assert done["error"] is None
    assert done["queue_position"] is None
    assert (done["prompt"], done["seed"], done["consent_id"], done["model"]) == ("she waves", 1, "c-1", "stub")
    assert done["seconds"] == "1.0625"
    mp4 = content(stub, done).content
    record = stub.client.get(f"/v1/videos/{done['id']}/record").json()
    assert record["sha256"] == hashlib.sha256(mp4).hexdigest()
    assert record["request"]["consent_id"] == "c-1"
    assert record["first_made_for"] == {"run_id": "on-demand", "row_id": done["id"]}


@pytest.mark.parametrize(
    ("asked", "start", "stop"), [("bytes=0-99", 0, 100), ("bytes=100-", 100, None), ("bytes=-50", -50, None)]
)
def test_content_range_is_answered_with_that_part(
    stub: Running, done: dict[str, object], asked: str, start: int, stop: int | None
) -> None:
    whole = content(stub, done)
    assert whole.headers["accept-ranges"] == "bytes"
    part = content(stub, done, Range=asked)
    assert part.status_code == 206
    assert part.content == whole.content[start:stop]
    size = len(whole.content)
    first = start % size
    assert part.headers["content-range"] == f"bytes {first}-{first + len(part.content) - 1}/{size}"


def test_content_range_beyond_the_end_and_known_tag_are_answered_without_content(
    stub: Running, done: dict[str, object]
) -> None:
    whole = content(stub, done)
    beyond = content(stub, done, Range="bytes=99999999-")
    assert beyond.status_code == 416
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert content(stub, done, **{"If-None-Match": whole.headers["etag"]}).status_code == 304
    stale = content(stub, done, **{"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (stale.status_code, len(stale.content)) == (200, len(whole.content))


def test_same_pixels_asked_twice_are_one_video_rendered_once(
    stub: Running, done: dict[str, object], astronaut_png: bytes
) -> None:
    again = stub.wait(stub.create(astronaut_png, seed=1, prompt="she waves", consent_id="c-2")["id"])
    assert again["id"] != done["id"]
    assert content(stub, again).content == content(stub, done).content
    renders = stub.renders()
    assert renders[str(done["id"])] + renders[again["id"]] == 1
    stub.client.delete(f"/v1/videos/{again['id']}")
    wait_until(lambda: not files_of(stub, again["id"]))
    # The video goes with the last request that refers to it.
    assert content(stub, done).status_code == 200


def test_idempotency_key_again_is_the_same_video_and_with_another_body_refused(
    stub: Running, astronaut_png: bytes
) -> None:
    headers = {"Idempotency-Key": "once"}
    first = stub.create(astronaut_png, seed=30, headers=headers)
    stub.wait(first["id"])
    again = stub.create(astronaut_png, seed=30, headers=headers)
    assert again["id"] == first["id"]
    assert stub.renders()[first["id"]] == 1
    other = stub.client.post(
        "/v1/videos",
        data={"prompt": "p", **SHAPE, "seed": 31},
        files={"photo": ("photo.png", astronaut_png)},
        headers=headers,
    )
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    # Another tenant's key of the same name is another key.
    with stub.client_of("elsewhere") as elsewhere:
        assert stub.create(astronaut_png, elsewhere, seed=30, headers=headers)["id"] != first["id"]


def test_create_as_json_takes_the_photo_as_base64(stub: Running, astronaut_png: bytes) -> None:
    photo = base64.b64encode(astronaut_png).decode()
    for form in ({"photo": photo}, {"input_reference": {"image_url": f"data:image/png;base64,{photo}"}}):
        # OpenAI's clients send the length as text.
        asked = {"prompt": "p", **SHAPE, "num_frames": None, "seconds": "1", "seed": 40, **form}
        answer = stub.client.post("/v1/videos", json=asked)
        assert answer.status_code == 202, answer.text
        ended = stub.wait(answer.json()["id"])
        assert (ended["status"], ended["seconds"]) == ("completed", "1.0625")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"size": "97x96"}, "invalid_size"),
        ({"num_frames": "16"}, "invalid_num_frames"),
        ({"num_frames": "17", "seconds": "1"}, "invalid_num_frames"),
        ({"tier": "fast"}, "tier_unavailable"),
        ({"num_inference_steps": "0"}, "invalid_num_inference_steps"),
        ({"model": "sora-2"}, "unknown_model"),
        ({"identity_lora": "../rival/anna"}, "invalid_identity_lora"),
        ({"prompt": " "}, "invalid_request"),
        ({"sede": "3"}, "invalid_request"),
        ({"seed": "three"}, "invalid_request"),
        ({"tags": "[1]", "tags[a]": "b", "seconds": "0"}, "invalid_num_frames"),
        ({"tags": json.dumps({"a": "x" * 513})}, "invalid_request"),
        ({"tags": '{"a": "\\ud800"}'}, "invalid_request"),
    ],
)
def test_create_with_a_bad_value_is_refused_with_the_batch_paths_code(
    stub: Running, astronaut_png: bytes, fields: dict[str, str], code: str
) -> None:
    answer = stub.client.post(
        "/v1/videos", data={"prompt": "p", "size": "96x96", **fields}, files={"photo": ("p.png", astronaut_png)}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 422


def test_create_with_what_is_no_photo_is_refused_at_once(stub: Running) -> None:
    for photo, code in ((b"text", "not_an_image"), (png(8, 8), "too_small"), (png(10_000, 6_000), "too_large")):
        answer = stub.client.post("/v1/videos", data={"prompt": "p"}, files={"photo": ("p.png", photo)})
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert "object at" not in answer.json()["detail"]


def test_photo_as_large_as_a_telephones_is_checked_and_accepted(stub: Running) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((2600, 2600), 99).save(buffer, "JPEG", quality=95)
    assert len(buffer.getvalue()) > 5 * 2**20
    check = stub.client.post("/v1/identities", files={"photo": ("p.jpg", buffer.getvalue())})
    assert (check.status_code, check.json().get("usable")) == (200, False)
    stub.forget(stub.create(buffer.getvalue(), seed=52)["id"])


def test_create_larger_than_the_limit_is_refused_before_the_body_is_read(stub: Running) -> None:
    host, port = stub.url.split("/")[2].split(":")
    request = (
        f"POST /stub/v1/videos HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: {stub.client.headers['Authorization']}\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), 30) as connection:
        # Only the head is sent: an answer shows that no more was waited for.
        connection.sendall(request.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_upload_is_kept_as_its_pixels_alone(stub: Running) -> None:
    upload = secretive(6)
    video = stub.create(upload, seed=50)
    name = stub.record(video["id"])["photo_sha256"]
    assert (stub.tenant() / f"runs/on-demand/uploads/{name}.jpg").read_bytes() == clean_photo(upload)
    stub.wait(video["id"])


def test_request_that_breaks_its_stage_fails_with_a_typed_error_and_the_next_one_works(
    stub: Running, astronaut_png: bytes
) -> None:
    fates = {"memory": "out_of_memory", "raise": "unexpected"}
    videos = {
        fate: stub.create(astronaut_png, seed=60 + i, tags=json.dumps({fate: "render"})) for i, fate in enumerate(fates)
    }
    after = stub.create(astronaut_png, seed=69)
    for fate, code in fates.items():
        failed = stub.wait(videos[fate]["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", code)
        assert failed["has_content"] is False
        answer = stub.client.get(f"/v1/videos/{failed['id']}/content")
        assert (answer.status_code, answer.json()["code"]) == (409, "no_video")
    assert stub.wait(after["id"])["status"] == "completed"


def test_list_pages_through_all_videos_in_order_once(stub: Running, astronaut_png: bytes) -> None:
    with stub.client_of("lister") as lister:
        made = [stub.create(astronaut_png, lister, seed=70, prompt=f"p{i}")["id"] for i in range(5)]
        for order, expected in (("asc", made), ("desc", made[::-1])):
            seen: list[str] = []
            page = {"has_more": True, "last_id": None}
            while page["has_more"]:
                after = {"after": page["last_id"]} if page["last_id"] else {}
                page = lister.get("/v1/videos", params={"limit": 2, "order": order, **after}).json()
                seen += [video["id"] for video in page["data"]]
            assert seen == expected
        assert lister.get("/v1/videos", params={"after": "video_0"}).status_code == 404


def test_other_tenants_ids_are_not_there_whatever_is_asked(
    stub: Running, done: dict[str, object], astronaut_png: bytes
) -> None:
    with stub.client_of("rival") as rival:
        assert rival.get("/v1/videos").json()["data"] == []
        path = f"/v1/videos/{done['id']}"
        answers = [
            rival.get(path),
            rival.delete(path),
            rival.get(f"{path}/content"),
            rival.get(f"{path}/record"),
            rival.get(f"{path}/events"),
            rival.post(f"{path}/remix", json={"prompt": "p"}),
            rival.get("/v1/videos", params={"after": str(done["id"])}),
        ]
        assert [answer.status_code for answer in answers] == [404] * 7
        uri = stub.client.get(f"{path}/record").json()["file"]
        assert rival.get(f"/v1/files/videos/{uri[:2]}/{uri}").status_code == 404
        assert stub.client.get(f"/v1/files/videos/{uri[:2]}/{uri}").status_code == 200
    assert stub.view(str(done["id"]))["status"] == "completed"


def test_delete_stops_the_work_within_one_step_and_leaves_no_file(stub: Running, hopper_jpg: bytes) -> None:
    video_id = stub.create(hopper_jpg, seed=80, tags=SLOW)["id"]
    wait_until(lambda: len(stub.steps(video_id)) >= 2)
    begun = len(stub.steps(video_id))
    assert stub.client.delete(f"/v1/videos/{video_id}").json() == {
        "id": video_id,
        "object": "video.deleted",
        "deleted": True,
    }
    assert stub.client.get(f"/v1/videos/{video_id}").status_code == 404
    wait_until(lambda: not files_of(stub, video_id))
    # The step that was under way when DELETE was answered may be one that began meanwhile.
    assert len(stub.steps(video_id)) <= begun + 1
    assert stub.renders()[video_id] == 0
    assert stub.client.delete(f"/v1/videos/{video_id}").status_code == 404


def test_delete_of_a_queued_video_never_starts_it(stub: Running, astronaut_png: bytes) -> None:
    with stub.occupied(astronaut_png):
        queued = stub.create(astronaut_png, seed=82)["id"]
        stub.forget(queued)
    later = stub.create(astronaut_png, seed=83)["id"]
    assert stub.wait(later)["status"] == "completed"
    assert stub.steps(queued) == []


def test_queued_is_queued_until_a_renderer_has_it(stub: Running, astronaut_png: bytes) -> None:
    with stub.occupied(astronaut_png) as busy:
        queued = [stub.create(astronaut_png, seed=84 + i)["id"] for i in range(2)]
        views = [stub.view(video_id) for video_id in queued]
        assert [view["status"] for view in views] == ["queued", "queued"]
        assert [view["queue_position"] for view in views] == [0, 1]
        wait_until(lambda: stub.view(busy[0])["progress"] >= 20)
        assert stub.view(busy[0])["eta_seconds"] > 0
        stub.forget(*queued)


def test_events_tell_each_change_with_previews_and_end_with_the_video(stub: Running, astronaut_png: bytes) -> None:
    video_id = stub.create(astronaut_png, seed=87, tags=SLOW)["id"]
    videos, previews = [], []
    with stub.client.stream("GET", f"/v1/videos/{video_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                (videos if event == "video" else previews).append(data)
    assert videos[-1]["status"] == "completed"
    steps = [video["step"] for video in videos[:-1]]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 8
    assert len(previews) >= 3
    picture = base64.b64decode(previews[0]["jpeg"].removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (32, 32)


def test_events_tell_when_a_waiting_videos_turn_comes_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serving.api.videos.EVENT_EVERY_S", 0)
    views = [{"status": status} for status in ("two go first", "two go first", "next", "completed")]
    service = Mock(ask=AsyncMock(side_effect=[{"version": 1, "video": view, "preview": None} for view in views]))

    async def watch() -> list[Any]:
        return [event.data async for event in watch_video(service, ("studio", "video"))]

    assert asyncio.run(watch()) == views[1:]


def test_events_of_a_video_that_is_deleted_end_with_that(stub: Running, astronaut_png: bytes) -> None:
    video_id = stub.create(astronaut_png, seed=88, tags=SLOW)["id"]
    with stub.client.stream("GET", f"/v1/videos/{video_id}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        stub.client.delete(f"/v1/videos/{video_id}")
        rest = list(lines)
    assert "event: deleted" in rest


def test_old_videos_are_deleted_on_request_with_their_files(stub: Running, astronaut_png: bytes) -> None:
    with stub.client_of("forgetful") as client:
        video = stub.create(astronaut_png, client, seed=90)
        wait_until(lambda: client.get(f"/v1/videos/{video['id']}").json()["status"] == "completed")
        assert client.delete("/v1/videos", params={"before": video["created_at"] - 1}).json()["deleted"] == 0
        assert client.delete("/v1/videos", params={"before": video["created_at"] + 2}).json()["deleted"] == 1
        assert client.get("/v1/videos").json()["data"] == []
    folder = stub.tenant("forgetful")
    # What is left is the dispatcher's own.
    wait_until(lambda: all("/epochs/" in path or path.endswith("/clock") for path in files_below(folder)))


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()
