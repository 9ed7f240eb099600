"""The page in a real browser, over the real service: what a person sees and does."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, FilePayload, Locator, Page, expect

from echovideo.request import RenderRequest
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath
from tests.pipelines.serving.conftest import Running, wait_until
from tests.pipelines.serving.test_videos import png

PATIENCE_MS = 30_000
SLOW = '{"step_s": "0.25"}'
VIEWS = ("takes", "confirm", "videos", "batches", "new", "complaints", "link", "used-link", "signed-out")


@dataclass
class Person:
    """Somebody at a browser, with a tenant's key to make links with."""

    service: Running
    tenant: str
    client: httpx.Client
    context: BrowserContext

    def link(self) -> str:
        path: str = self.client.post("/v1/sign-in-links").json()["path"]
        return self.service.url + path

    def sign_in(self) -> Page:
        """A new tab of a browser that has just signed in."""
        page = self.context.new_page()
        page.goto(self.link())
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="New video")).to_be_visible()
        return page

    def open(self, *video_ids: str) -> Page:
        """A new tab with videos side by side."""
        page = self.context.new_page()
        page.goto(self.address(*video_ids))
        return page

    def address(self, *video_ids: str) -> str:
        return f"{self.service.url}/#/videos/{','.join(video_ids)}"

    def create(self, photo: bytes, **fields: Any) -> str:
        """Ask for a video over HTTP and return its id."""
        video_id: str = self.service.create(photo, self.client, **fields)["id"]
        return video_id

    def view(self, video_id: str) -> dict[str, Any]:
        view: dict[str, Any] = self.client.get(f"/v1/videos/{video_id}").json()
        return view

    def wait(self, *video_ids: str) -> None:
        for video_id in video_ids:
            wait_until(lambda name=video_id: self.view(name)["status"] in ("completed", "failed"))  # type: ignore[misc]

    def put_manifest(self) -> str:
        """A manifest of two rows, one of which is refused, among the tenant's inputs."""
        manifest = self.service.tenant(self.tenant) / "inputs" / "two rows.parquet"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        shape = {"height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 10}
        rows = [
            RenderRequest(row_id=f"row-{i}", prompt="A man runs", photo_bytes=b"x", seed=i, tier=tier, **shape)  # type: ignore[arg-type]
            for i, tier in enumerate(("exact", "high"))
        ]
        write_manifest(rows, StoragePath.parse(str(manifest)))
        return manifest.name

    def make_batch(self) -> str:
        """A batch that has ended, with a report."""
        batch_id: str = self.client.post("/v1/batches", json={"manifest": self.put_manifest()}).json()["id"]
        wait_until(lambda: self.client.get(f"/v1/batches/{batch_id}").json()["status"] == "completed")
        return batch_id


@pytest.fixture
def person(stub: Running, browser: Browser) -> Iterator[Person]:
    """Somebody with a tenant of their own, whose page must neither break its policy nor ask another site."""
    tenant = f"page-{secrets.token_hex(4)}"
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    wrong: list[str] = []
    watch(context, stub.url, wrong)
    with stub.client_of(tenant, requests_per_minute=10_000, max_active=1_000) as client:
        yield Person(stub, tenant, client, context)
    context.close()
    assert wrong == []


def watch(context: BrowserContext, url: str, wrong: list[str]) -> None:
    """Note requests that leave the service's own addresses, breaches of the policy, and errors of scripts."""
    own = (f"{url}/", "data:", f"blob:{url.rpartition('/')[0]}/")
    context.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    breaches = ("Content Security Policy", "requires 'Trusted")
    context.on("console", lambda said: wrong.append(said.text) if any(b in said.text for b in breaches) else None)
    context.on("weberror", lambda error: wrong.append(str(error.error)))


@pytest.fixture
def photo(astronaut_png: bytes) -> FilePayload:
    return {"name": "astronaut.png", "mimeType": "image/png", "buffer": astronaut_png}


def fill(page: Page, photo: FilePayload, prompt: str = "A woman waves") -> None:
    """Fill the form in for a video that is made soon; it is slow if the page's form says so."""
    page.set_input_files("#photo", photo)
    expect(page.get_by_text("This face can be used")).to_be_visible()
    page.get_by_label("What happens").fill(prompt)
    page.get_by_label("Size").select_option("square")
    page.get_by_label("Length").select_option("9")


def play(video: Locator) -> dict[str, float]:
    """Play a video until a tenth of a second of it was seen; return its measures."""
    measures: dict[str, float] = video.evaluate(
        """async (video) => {
            video.muted = true;
            await video.play();
            while (video.currentTime < 0.1) await new Promise(requestAnimationFrame);
            return { width: video.videoWidth, height: video.videoHeight, duration: video.duration };
        }"""
    )
    return measures


def test_journey_from_a_photo_to_two_takes_side_by_side_and_a_download(person: Person, photo: FilePayload) -> None:
    page = person.sign_in()
    fill(page, photo)
    crop = page.get_by_alt_text("The face as the model will see it")
    expect(crop).to_be_visible()
    assert crop.evaluate("image => image.naturalWidth") == 512
    # The frame lies around the face in the picture, which is shown smaller than it is.
    shown, frame = page.locator("#seen-photo").bounding_box(), page.locator("#seen-box rect").bounding_box()
    assert shown is not None
    assert frame is not None
    left, right = [(edge - shown["x"]) / shown["width"] * 512 for edge in (frame["x"], frame["x"] + frame["width"])]
    assert 150 < left < right < 320

    page.get_by_label("Takes").select_option("2")
    page.get_by_text("More settings").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Steps").fill("10")
    # The stub's renderer takes its time where a row's tags say so.
    page.evaluate(
        """tags => document.getElementById("ask").append(
            Object.assign(document.createElement("input"), { type: "hidden", name: "tags", value: tags }))""",
        SLOW,
    )
    page.get_by_role("button", name="Make 2 takes").click()
    expect(page.get_by_role("heading", name="2 takes")).to_be_visible()
    expect(page.get_by_alt_text(re.compile(r"after step \d"))).to_have_count(2)
    expect(page.get_by_text(re.compile(r"Step [1-9] of 10")).first).to_be_visible()

    videos = page.locator("video")
    expect(videos).to_have_count(2)
    for video in videos.all():
        assert play(video) == pytest.approx({"width": 480, "height": 480, "duration": 9 / 16}, abs=0.05)
    expect(page.get_by_role("button", name="Play together")).to_be_visible()
    expect(page.locator(".take h2")).to_have_text(["Seed 7", "Seed 8"])
    with page.expect_download() as download:
        page.get_by_role("link", name="Download seed 8").click()
    assert download.value.suggested_filename == "echovideo-seed-8.mp4"
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"

    page.locator(".take").last.get_by_text("How it was made").click()
    facts = page.locator(".record .facts")
    expect(facts).to_contain_text("A woman waves")
    expect(facts).to_contain_text("480x480, 9 frames at 16 a second")
    page.get_by_text("The whole record").click()
    expect(page.locator(".record pre")).to_contain_text('"photo_sha256"')

    page.get_by_role("button", name="Another take").first.click()
    expect(page.locator(".take h2")).to_have_text(["Seed 7", "Seed 8", "Seed 9"])
    expect(videos).to_have_count(3)
    prompts = {video["prompt"] for video in person.client.get("/v1/videos").json()["data"]}
    assert prompts == {"A woman waves"}


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_photo_that_is_dropped_or_pasted_is_checked_like_a_chosen_one(
    person: Person, photo: FilePayload, way: str
) -> None:
    page = person.sign_in()
    page.evaluate(
        """([way, base64]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
            data.items.add(new File([bytes], "photo.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            document.getElementById("drop").dispatchEvent(event);
        }""",
        [way, base64.b64encode(photo["buffer"]).decode()],
    )
    expect(page.get_by_text("This face can be used")).to_be_visible()
    expect(page.get_by_alt_text("The face as the model will see it")).to_be_visible()


def test_refusals_are_said_in_words_where_they_are_met(person: Person, photo: FilePayload) -> None:
    page = person.sign_in()
    send = page.get_by_role("button", name="Make the video")
    send.click()
    expect(page.get_by_text("Choose a photo first.")).to_be_visible()
    expect(page.get_by_text("Say in a few sentences what happens.")).to_be_visible()

    page.set_input_files("#photo", {**photo, "buffer": png(256, 256)})
    expect(page.get_by_text("No face was found in the photo.")).to_be_visible()
    expect(page.locator("#seen-face")).to_be_hidden()
    page.set_input_files("#photo", {**photo, "buffer": b"no picture"})
    expect(page.get_by_text("cannot be opened as a picture")).to_be_visible()

    fill(page, photo, prompt=" \n ")
    send.click()
    prompt = page.get_by_label("What happens")
    expect(prompt).to_be_focused()
    expect(prompt).to_have_attribute("aria-invalid", "true")
    expect(prompt).to_have_accessible_description("Say in a few sentences what happens.")
    prompt.fill("A woman waves")

    tier = page.get_by_label("Quality tier")
    expect(tier.locator("option:disabled")).to_have_text(["high, not to be had here", "fast, not to be had here"])
    # A page that was opened before an engine lost a tier still offers it.
    tier.evaluate("field => { field.options[1].disabled = false }")
    tier.select_option("high")
    send.click()
    expect(page.get_by_role("alert")).to_contain_text("Choose another tier.")
    assert person.client.get("/v1/videos").json()["data"] == []

    tier.select_option("exact")
    send.click()
    expect(page.locator("video")).to_have_count(1)


def test_video_refused_by_the_path_itself_says_why_in_the_page(person: Person, astronaut_png: bytes) -> None:
    failed = person.create(astronaut_png, tags='{"memory": "render"}')
    person.sign_in()
    page = person.open(failed)
    expect(page.locator(".take .badge")).to_have_text("Failed")
    expect(page.locator(".take .reason")).to_have_text("As much as there is was not enough.")
    expect(page.get_by_role("link", name="Download")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".take .badge")).to_have_text(["Failed", "Failed"])
    page.goto(person.address("video_" + "0" * 24))
    expect(page.get_by_role("listitem").get_by_text("This video is not there")).to_be_visible()


def test_reload_in_mid_render_goes_on_where_the_render_is(person: Person, astronaut_png: bytes) -> None:
    person.sign_in()
    page = person.open(person.create(astronaut_png, tags=SLOW, seed=500))
    expect(page.get_by_text(re.compile(r"Step [1-9] of 10"))).to_be_visible()
    before = page.locator("progress").evaluate("bar => bar.value")
    page.reload()
    expect(page.get_by_text(re.compile(r"Step [1-9] of 10"))).to_be_visible()
    assert page.locator("progress").evaluate("bar => bar.value") >= before > 0
    expect(page.locator("video")).to_have_count(1)
    assert play(page.locator("video"))["width"] == 96


def test_cancel_in_one_tab_stops_the_work_and_the_other_tab_says_so(person: Person, astronaut_png: bytes) -> None:
    video_id = person.create(astronaut_png, tags='{"step_s": "1"}', seed=510)
    page = person.sign_in()
    page.goto(person.address(video_id))
    other = person.open(video_id)
    for tab in (page, other):
        expect(tab.get_by_text(re.compile(r"Step [1-9] of 10"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("listitem").get_by_text("Cancelled. Nothing of this video is kept.")).to_be_visible()
    expect(other.get_by_role("listitem").get_by_text("The video was deleted.")).to_be_visible()
    assert person.client.get(f"/v1/videos/{video_id}").status_code == 404
    assert len(person.service.steps(video_id)) < 10
    assert person.service.renders()[video_id] == 0


def test_four_videos_at_once_in_two_tabs_all_end_in_sight(person: Person, astronaut_png: bytes) -> None:
    # A browser has six connections to a server for all of its tabs: as many streams as videos would leave none.
    ids = [person.create(astronaut_png, seed=520 + i, tags='{"step_s": "0.1"}') for i in range(4)]
    page = person.sign_in()
    page.goto(person.address(*ids))
    other = person.open(*ids)
    for tab in (page, other):
        expect(tab.locator("video")).to_have_count(4)
        expect(tab.locator(".badge")).to_have_text(["Finished"] * 4)


def test_sign_in_link_is_good_once_and_its_session_ends_with_sign_out(person: Person, browser: Browser) -> None:
    link = person.link()
    page = person.context.new_page()
    page.goto(link)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="New video")).to_be_visible()
    (cookie,) = person.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""

    stranger = browser.new_context()
    elsewhere = stranger.new_page()
    elsewhere.goto(link)
    elsewhere.get_by_role("button", name="Sign in").click()
    expect(elsewhere.get_by_role("heading", name="This link is used up")).to_be_visible()
    elsewhere.goto(f"{person.service.url}/")
    expect(elsewhere.get_by_role("heading", name="You are not signed in")).to_be_visible()
    stranger.close()

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()


def test_gallery_shows_older_videos_on_demand_and_compares_the_chosen(person: Person, astronaut_png: bytes) -> None:
    ids = [person.create(astronaut_png, prompt=f"Scene {i}") for i in range(14)]
    person.wait(*ids)
    page = person.sign_in()
    page.get_by_role("link", name="Videos").click()
    tiles = page.locator(".tile h2")
    expect(tiles).to_have_text([f"Scene {i}" for i in range(13, 1, -1)])
    page.get_by_role("button", name="Show older").click()
    expect(tiles).to_have_text([f"Scene {i}" for i in range(13, -1, -1)])
    expect(page.get_by_role("link", name="Scene 1", exact=True)).to_be_focused()
    expect(page.get_by_role("button", name="Show older")).to_be_hidden()

    compare = page.get_by_role("button", name="Compare")
    expect(compare).to_be_disabled()
    for name in ("Scene 12", "Scene 0"):
        page.get_by_role("checkbox", name=f"Compare: {name}, seed").check()
    expect(compare).to_have_text("Compare 2")
    compare.click()
    expect(page.locator(".take .prompt")).to_have_text(["Scene 12", "Scene 0"])
    expect(page.locator("video")).to_have_count(2)

    late = person.create(astronaut_png, prompt="Scene 14")
    page.go_back()
    expect(tiles.first).to_have_text("Scene 14")
    person.wait(late)
    newest = person.create(astronaut_png, prompt="Scene 15")
    expect(tiles.first).to_have_text("Scene 15")
    person.wait(newest)


def test_batch_is_listed_with_its_counts_and_its_report_opens(person: Person) -> None:
    person.make_batch()
    page = person.sign_in()
    page.get_by_role("link", name="Batches").click()
    card = page.locator(".batch")
    expect(card.get_by_role("heading")).to_have_text("two rows.parquet")
    expect(card).to_contain_text("1 finished, 1 refused")
    widths = card.locator("rect").evaluate_all("parts => parts.map(part => part.width.baseVal.value)")
    assert widths == [50, 50]
    card.get_by_role("link", name="Report").click()
    expect(page.get_by_text("EchoVideo run report")).to_be_visible()
    assert play(page.locator("video"))["width"] == 96


def test_batch_is_started_and_deleted_in_the_page(person: Person) -> None:
    manifest = person.put_manifest()
    page = person.sign_in()
    page.get_by_role("link", name="Batches").click()
    expect(page.get_by_text("No batches yet.")).to_be_visible()
    field, send = page.get_by_label("Manifest"), page.get_by_role("button", name="Render the manifest")
    for wrong, complaint in (
        ("", "Say which manifest is to be rendered."),
        ("none.parquet", re.compile("no such file")),
    ):
        field.fill(wrong)
        send.click()
        expect(field).to_be_focused()
        expect(field).to_have_accessible_description(complaint)
    field.fill(manifest)
    send.click()
    card = page.locator(".batch")
    expect(card).to_contain_text("1 finished, 1 refused")
    expect(field).to_have_value("")
    card.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(card).to_have_count(1)
    card.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    expect(page.get_by_role("heading", name="Batches")).to_be_focused()
    assert person.client.get("/v1/batches").json()["data"] == []


def test_keyboard_alone_makes_a_video_and_deletes_it(person: Person, photo: FilePayload) -> None:
    page = person.context.new_page()
    page.goto(person.link())
    tab_to(page, "button", "Sign in on this browser")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="New video")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    tab_to(page, "file", "Photo")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(photo)
    expect(page.get_by_text("This face can be used")).to_be_visible()
    tab_to(page, "textarea", "What happens")
    page.keyboard.type("A woman waves")
    tab_to(page, "select-one", "Size")
    page.keyboard.type("sq")
    tab_to(page, "select-one", "Length")
    page.keyboard.press("Home")
    expect(page.get_by_label("Length")).to_have_value("9")
    tab_to(page, "submit", "Make the video")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Video", exact=True)).to_be_focused()
    expect(page.locator("video")).to_have_count(1)

    tab_to(page, "submit", "Delete seed 42")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Delete seed 42")).to_be_focused()
    assert len(person.client.get("/v1/videos").json()["data"]) == 1
    page.keyboard.press("Enter")
    tab_to(page, "submit", "Delete")
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem").get_by_text("Deleted.")).to_be_visible()
    assert person.client.get("/v1/videos").json()["data"] == []


def tab_to(page: Page, kind: str, name: str) -> None:
    """Press Tab until the focus is on what has this type and name."""
    focused = """() => {
        const { activeElement: at } = document;
        const labels = (at.getAttribute("aria-labelledby") ?? "").split(" ").map(id => document.getElementById(id));
        const texts = [...labels, at.labels?.[0], at].map(element => element?.textContent);
        const words = [at.ariaLabel, ...texts];
        return [at.type ?? at.localName, words.find(Boolean) ?? ""];
    }"""
    passed = []
    for _ in range(40):
        page.keyboard.press("Tab")
        at, words = page.evaluate(focused)
        if at in (kind, "submit" if kind == "button" else kind) and words.strip().startswith(name):
            return
        passed.append((at, words.strip()[:40]))
    raise AssertionError(f"Tab does not come to {name!r}, but to {passed}")


def show(view: str, person: Person, photo: FilePayload, ids: list[str]) -> Page:
    """Open a view in a new tab."""
    if view in ("link", "used-link", "signed-out"):
        person.context.clear_cookies()
        page = person.context.new_page()
        page.goto(f"{person.service.url}/" if view == "signed-out" else person.link())
        if view == "used-link":
            page.locator("[name=token]").evaluate("field => { field.value = 'x' }")
            page.get_by_role("button", name="Sign in").click()
        headings = {"link": "Sign in", "used-link": "This link is used up", "signed-out": "You are not signed in"}
        expect(page.get_by_role("heading", name=headings[view])).to_be_visible()
        # A form's answer can be read before its style sheet is there.
        page.wait_for_load_state()
        return page
    page = person.open(*ids) if view in ("takes", "confirm") else person.context.new_page()
    if view in ("new", "complaints"):
        page.goto(f"{person.service.url}/")
        page.get_by_text("More settings").click()
        if view == "new":
            fill(page, photo)
        else:
            page.get_by_role("button", name="Make the video").click()
            expect(page.get_by_text("Choose a photo first.")).to_be_visible()
    elif view in ("videos", "batches"):
        page.goto(f"{person.service.url}/#/{view}")
        expect(page.locator(".tile" if view == "videos" else ".batch").first).to_be_visible()
    else:
        expect(page.locator("video")).to_have_count(1)
        expect(page.locator(".take .reason:visible")).to_have_count(1)
        expect(page.locator("progress:visible")).to_have_count(1)
        page.locator(".take:has(video)").get_by_text("How it was made").click()
        expect(page.locator(".record .facts")).to_be_visible()
        if view == "confirm":
            page.get_by_role("button", name="Delete").first.click()
            expect(page.get_by_role("dialog")).to_be_visible()
    return page


def test_every_view_passes_axe_and_fits_its_width_in_light_and_dark(
    person: Person, photo: FilePayload, astronaut_png: bytes
) -> None:
    prompt = "A woman waves at somebody whom nobody sees, " * 3
    broken = '{"raise": "render"}'
    ids = [
        person.create(astronaut_png, prompt=prompt, seed=530 + i, tags=tags) for i, tags in enumerate(("{}", broken))
    ]
    person.wait(*ids)
    person.make_batch()
    ids.append(person.create(astronaut_png, prompt=prompt, seed=533, tags='{"step_s": "3"}'))
    person.sign_in().close()
    problems: dict[str, str] = {}
    for view in VIEWS:
        if view == "videos":
            person.client.delete(f"/v1/videos/{ids[-1]}")
        page = show(view, person, photo, ids)
        for scheme, width in (("light", 1280), ("dark", 360)):
            page.set_viewport_size({"width": width, "height": 740})
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            results = Axe().run(page)
            if results.violations_count:
                problems[f"{view}, {scheme}"] = results.generate_report()
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                problems[f"{view}, {width} px"] = f"{wide} px wide"
        page.close()
    assert problems == {}


def test_policy_stops_what_a_script_of_another_site_would_do(browser: Browser, stub: Running) -> None:
    # Also shows that what the other tests watch for would be noticed.
    context = browser.new_context()
    wrong: list[str] = []
    watch(context, stub.url, wrong)
    page = context.new_page()
    answer = page.goto(f"{stub.url}/")
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()
    assert wrong == []
    for attempt in (
        "document.body.append(Object.assign(new Image(), { src: 'http://localhost:9/x.png' }))",
        "document.body.append(Object.assign(document.createElement('style'), { textContent: 'a { color: red }' }))",
        "try { document.body.innerHTML = '<b>x</b>' } catch {}",
    ):
        noticed = len(wrong)
        with page.expect_console_message(lambda said: "Content Security" in said.text or "Trusted" in said.text):
            page.evaluate(attempt)
        assert len(wrong) > noticed
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()
    context.close()
