"""The whole path with the tiny model's real networks and a store on S3, as a web team and a person meet it."""

from __future__ import annotations

import base64
import io
import os
import secrets
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect
from ray import serve

from echovideo.model.card import TINY
from echovideo.request import RenderRequest
from echovideo.video import decode_mp4
from pipelines.outcome import Rejected
from pipelines.serving.app import bind
from pipelines.serving.config import ServiceConfig
from pipelines.serving.records import TenantStore, VideoRecord
from pipelines.storage import StorageOptions
from tests.pipelines.serving.conftest import Running, running, wait_until
from tests.pipelines.serving.test_videos import png

OLD = "video_" + "0" * 24
OLD_BATCH = "0" * 16
PATIENCE_MS = 60_000
SHAPE = {"num_inference_steps": 6, "seed": 5}


@pytest.fixture(scope="module")
def tiny(serve_port: int, tiny_folder: Path, s3_options: StorageOptions) -> Iterator[Running]:
    """The service with the tiny model, whose store is a prefix of an S3 bucket."""
    config = ServiceConfig.of_model(
        str(tiny_folder),
        store=f"s3://echovideo/{secrets.token_hex(8)}",
        storage=s3_options,
        retention_days=1,
        secure_cookies=False,
    )
    put_old_request(config)
    serve.run(bind(config), name="tiny", route_prefix="/tiny")
    yield running(f"http://127.0.0.1:{serve_port}/tiny", config)
    serve.delete("tiny")


def put_old_request(config: ServiceConfig) -> None:
    """Leave what a service of two days ago would have: a request that was refused, and its photo; and a batch."""
    home = TenantStore(config, "old")
    request = RenderRequest(row_id=OLD, prompt="p", photo_uri="uploads/0.jpg")
    record = VideoRecord(
        tenant="old", key_id="k", created_at=time.time() - 2 * 86400, request=request, photo_sha256="0", nonce="n"
    )
    home.accept(record, b"photo")
    batch = home.ledger.root / "runs" / OLD_BATCH
    (batch / "run.json").write_json({"manifest": "m", "card": {"name": "tiny"}})
    (batch / "accepted.json").write_json({"created_at": record.created_at, "num_rows": 0})
    (batch / "ended.json").write_json({"error": None})
    with home.ledger.open_epoch() as epoch:
        home.ledger.commit(Rejected(row_id=OLD, code="no_face", message="m"), epoch.number)


def test_what_is_older_than_its_retention_is_deleted_with_its_photo(tiny: Running) -> None:
    folder = tiny.config.tenant_root("old") / "runs/on-demand"
    wait_until(lambda: not any((folder / name).exists() for name in (f"requests/{OLD}.json", "uploads/0.jpg")))
    wait_until(lambda: not (folder / "removed" / OLD).exists())
    wait_until(lambda: (folder.parent / OLD_BATCH).list_files() == [])
    assert not (folder / "outcomes" / f"{OLD}.json").exists()


def test_photo_check_shows_the_face_that_the_model_will_see(tiny: Running, astronaut_png: bytes) -> None:
    answer = tiny.client.post("/v1/identities", files={"photo": ("photo.png", astronaut_png)})
    assert answer.status_code == 200, answer.text
    check = answer.json()
    assert check["usable"] is True
    assert check["photo"] == {"width": 512, "height": 512}
    left, top, right, bottom = check["box"]
    assert 150 < left < right < 320
    assert 30 < top < bottom < 230
    assert check["quality"]["detection_score"] > 0.9
    with Image.open(io.BytesIO(base64.b64decode(check["crop"].partition(",")[2]))) as crop:
        assert crop.size == (512, 512)
        # The background is cut out, the face is not.
        assert max(crop.getpixel((4, 4))) < 16
        assert min(crop.getpixel((256, 300))) > 40
    # Nothing of it is kept.
    assert tiny.config.tenant_root("studio").list_files() == []


def test_photo_check_of_a_photo_without_a_face_says_why(tiny: Running) -> None:
    photo = png(256, 256)
    check = tiny.client.post("/v1/identities", json={"photo": base64.b64encode(photo).decode()}).json()
    assert (check["usable"], check["refusal"]["code"], check["crop"]) == (False, "no_face", None)
    video = tiny.create(photo)
    failed = tiny.wait(video["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "no_face")


def test_openai_client_gets_a_video_of_the_tiny_model_with_previews_on_the_way(
    tiny: Running, astronaut_png: bytes
) -> None:
    key = tiny.client.headers["Authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key=key, max_retries=0)
    with warnings.catch_warnings():
        # The client warns that another company's service has ended.
        warnings.simplefilter("ignore", DeprecationWarning)
        video = client.videos.create(
            prompt="A woman waves",
            input_reference=("photo.png", astronaut_png),
            size="160x96",  # type: ignore[arg-type]
            seconds="1",  # type: ignore[arg-type]
            extra_body=SHAPE,
        )
        with tiny.client.stream("GET", f"/v1/videos/{video.id}/events") as stream:
            events = [line for line in stream.iter_lines() if line.startswith("event: ")]
        ended = client.videos.retrieve(video.id)
        assert ended.status == "completed", ended.error
        mp4 = client.videos.download_content(video.id).read()
    assert decode_mp4(mp4).shape == (17, 96, 160, 3)
    part = tiny.client.get(f"/v1/videos/{video.id}/content", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, mp4[100:200])
    assert "event: preview" in events
    record = tiny.client.get(f"/v1/videos/{video.id}/record").json()
    assert record["seed"] == 5
    root = tiny.config.tenant_root("studio")
    assert (root / "videos" / record["file"][:2] / record["file"]).read_bytes() == mp4
    for kind in ("requests", "outcomes"):
        assert (root / "runs/on-demand" / kind / f"{video.id}.json").exists()
    assert record["model"]["name"] == TINY.name
    view = tiny.view(video.id)
    assert view["steps"] == 6
    assert view["expires_at"] == view["created_at"] + 86400
    for variant in ("thumbnail", "photo", "face"):
        picture = tiny.client.get(f"/v1/videos/{video.id}/content", params={"variant": variant})
        assert picture.headers["content-type"] == "image/jpeg"

    text = tiny.client.get("/metrics").text
    assert 'echovideo_outcomes_total{outcome="ok"} 1.0' in text
    for measure in ("queue_wait_seconds_count", "steps_per_second", 'memory_bytes{kind="host"}', 'stage="denoise"'):
        assert measure in text


def test_video_of_a_registered_identity_is_rendered_with_its_adapter_and_says_so(
    tiny: Running, astronaut_png: bytes
) -> None:
    # In place of the bias with which fusion sums up the prompt's 96 tokens.
    card = tiny.learn("anna", {"text_proj.bias": torch.full((96,), 2.0)})
    asked = {**SHAPE, "num_frames": 9, "consent_id": card.consent_id}
    frames, records = [], []
    for identity in ({"identity_lora": "anna"}, {}):
        video = tiny.wait(tiny.create(astronaut_png, **asked, **identity)["id"])
        assert video["status"] == "completed", video["error"]
        frames.append(decode_mp4(tiny.client.get(f"/v1/videos/{video['id']}/content").content))
        records.append(tiny.client.get(f"/v1/videos/{video['id']}/record").json())
    assert (frames[0] != frames[1]).any()
    assert records[0]["identity_lora"] == asdict(card)
    assert "identity_lora" not in records[1]


def test_options_and_estimate_say_what_a_form_needs(tiny: Running) -> None:
    options = tiny.client.get("/v1/options").json()
    assert options["model"] == asdict(TINY)
    assert options["sizes"] == {"96x96": {"width": 96, "height": 96}}
    assert options["num_frames"] == [9, 17]
    assert (options["defaults"]["size"], options["defaults"]["num_frames"]) == ("96x96", 17)
    estimate = tiny.client.get("/v1/estimate", params={"size": "160x96", "num_frames": 17, "num_inference_steps": 6})
    assert estimate.json()["render_seconds"] > 0
    assert estimate.json()["queue_seconds"] == 0


def test_person_gets_a_video_of_the_tiny_model_in_the_page(
    tiny: Running, browser: Browser, astronaut_png: bytes
) -> None:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page = context.new_page()
    page.goto(tiny.url + tiny.client.post("/v1/sign-in-links").json()["path"])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text(TINY.notice)).to_be_visible()
    page.set_input_files("#photo", {"name": "photo.png", "mimeType": "image/png", "buffer": astronaut_png})
    expect(page.get_by_text("This face can be used")).to_be_visible()
    crop = page.get_by_alt_text("The face as the model will see it")
    assert crop.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    page.get_by_label("What happens").fill("A woman waves from the page")
    # The sizes that people are offered take the tiny model minutes.
    page.evaluate("document.getElementById('size').append(new Option('96x96'))")
    page.get_by_label("Size").select_option("96x96")
    page.get_by_label("Length").select_option("17")
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill("6")
    page.get_by_label("Seed").fill("11")
    page.get_by_role("button", name="Make the video").click()
    video = page.locator("video")
    expect(video).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert decode_mp4(Path(download.value.path()).read_bytes()).shape == (17, 96, 96, 3)
    page.get_by_text("How it was made").click()
    facts = page.locator(".record .facts")
    expect(facts).to_contain_text("A woman waves from the page")
    expect(facts).to_contain_text(TINY.name)
    page.get_by_role("link", name="Videos").click()
    expect(page.get_by_role("link", name="A woman waves from the page")).to_be_visible()
    context.close()


def test_application_and_ingress_load_without_torch() -> None:
    # A replica that imports torch takes seconds to be there; only renderers and the face check may.
    program = (
        "import sys, pipelines.serving.app, pipelines.serving.api.app, pipelines.serving.local; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
