"""The results table, the contact sheet and the HTML report, over real videos and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page
from skimage import data

from echovideo.video import Video, encode_mp4, poster_jpeg
from pipelines.outcome import Cancelled, Dead, Failed, Ok, Rejected
from pipelines.report import (
    MAX_CARDS,
    MAX_EMBEDDED_BYTES,
    MAX_SHEET_ROWS,
    RESULTS_SCHEMA,
    RowView,
    RunView,
    contact_sheet,
    render_report,
    results_table,
)

HOSTILE = "<script>document.title='broken'</script><img src=x onerror=alert(1)> \"a\" & 'b'"


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    return jpeg(data.astronaut()[::2, ::2])


@pytest.fixture(scope="module")
def face() -> bytes:
    return jpeg(data.astronaut()[20:190, 140:310])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Video:
    picture = data.astronaut()
    frames = np.stack([picture[t : t + 240, 2 * t : 2 * t + 416] for t in range(33)])
    return encode_mp4(frames, tmp_path_factory.mktemp("video") / "a.mp4", fps=16, metadata={})


@pytest.fixture(scope="module")
def rows(photo: bytes, face: bytes, video: Video) -> tuple[RowView, ...]:
    mp4 = Path(video.uri)
    ok = Ok(
        row_id="first",
        attempt=2,
        video=video,
        sidecar_uri="videos/first.json",
        seed=43,
        seeds_tried=(42, 43),
        face_similarity=0.71,
        detection_rate=1.0,
        timings={"condition": 2.0, "denoise": 6.0},
    )
    first = RowView(
        row_id="first",
        prompt="A woman waves.",
        outcome=ok,
        photo=photo,
        face=face,
        poster=poster_jpeg(data.astronaut()[:240, :416]),
        tags={"scene": "7"},
        read_mp4=mp4.read_bytes,
        href="videos/first.mp4",
    )
    blurred = Rejected(
        row_id="blurred",
        code="blurred",
        message="the face is blurred: sharpness 0.021, 0.060 is needed",
        numbers={"sharpness": 0.021, "min_sharpness": 0.06},
    )
    gated = Rejected(
        row_id="gated",
        code="face_similarity",
        message="best of 3 seeds reached 0.41",
        numbers={"face_similarity": 0.41},
        video=video,
    )
    odd = Rejected(row_id="odd", code="never_heard_of", message="a message of its own")
    failed = Failed(
        row_id="failed",
        attempt=1,
        stage="render",
        code="out_of_memory",
        message="out of memory",
        traceback="Traceback (most recent call last):\n  File <stdin>",
    )
    return (
        first,
        RowView(row_id="blurred", prompt="She laughs.", outcome=blurred, photo=photo),
        replace(first, row_id="gated", prompt="She dances. " * 40, outcome=gated, href=None),
        RowView(row_id="odd", prompt="", outcome=odd),
        RowView(row_id="failed", prompt=HOSTILE, outcome=failed, photo=photo, face=face),
        RowView(
            row_id="dead", prompt="She runs.", outcome=Dead(row_id="dead", strikes=3, message="three workers lost")
        ),
        RowView(row_id="later", prompt="She sits.", outcome=Cancelled(row_id="later", attempt=1)),
        replace(first, row_id="again", outcome=replace(ok, row_id="again", reused=True, timings={})),
    )


def run_view(rows: tuple[RowView, ...], *, notice: str = "", judged: bool = True) -> RunView:
    return RunView(
        run_id="spring-run",
        started="2026-03-01T09:00:00+00:00",
        finished="2026-03-01T09:05:30+00:00",
        model="EchoVideo tiny",
        notice=notice,
        judged=judged,
        licence="Weights: Apache-2.0.",
        rows=rows,
        settings={"tier": "exact", "num_inference_steps": 50},
    )


def test_results_table_has_one_line_per_row_in_the_documented_schema(rows: tuple[RowView, ...]) -> None:
    table = results_table(rows)
    assert table.schema.equals(RESULTS_SCHEMA, check_metadata=True)
    assert RESULTS_SCHEMA.metadata[b"version"] == b"1"
    assert all(field.metadata[b"doc"] for field in RESULTS_SCHEMA)
    assert table["row_id"].to_pylist() == [row.row_id for row in rows]
    assert table["outcome"].to_pylist() == [
        "ok",
        "rejected",
        "rejected",
        "rejected",
        "failed",
        "dead",
        "cancelled",
        "ok",
    ]


def test_results_table_of_each_outcome_keeps_its_values(rows: tuple[RowView, ...], video: Video) -> None:
    ok, blurred, gated, _, failed, dead, later, again = results_table(rows).to_pylist()
    assert (ok["video_uri"], ok["sha256"], ok["width"], ok["height"]) == (video.uri, video.sha256, 416, 240)
    assert (ok["num_frames"], ok["fps"], ok["duration_s"]) == (33, 16, 33 / 16)
    assert (ok["seed"], ok["seeds_tried"], ok["attempt"], ok["reused"]) == (43, [42, 43], 2, False)
    assert (ok["face_similarity"], ok["detection_rate"]) == (0.71, 1.0)
    assert ok["timings"] == [("condition", 2.0), ("denoise", 6.0)]
    assert ok["tags"] == [("scene", "7")]
    assert ok["sidecar_uri"] == "videos/first.json"
    assert again["reused"] is True
    assert (blurred["code"], blurred["video_uri"]) == ("blurred", None)
    assert blurred["numbers"] == [("sharpness", 0.021), ("min_sharpness", 0.06)]
    assert gated["sha256"] == video.sha256
    assert (failed["stage"], failed["code"], failed["attempt"]) == ("render", "out_of_memory", 1)
    assert (dead["strikes"], dead["message"]) == (3, "three workers lost")
    assert (later["attempt"], later["message"]) == (1, None)


def test_results_table_written_as_parquet_reads_back_equal(rows: tuple[RowView, ...], tmp_path: Path) -> None:
    table = results_table(rows)
    pq.write_table(table, tmp_path / "results.parquet")
    assert pq.read_table(tmp_path / "results.parquet").equals(table)


def test_results_table_of_no_rows_keeps_the_schema() -> None:
    table = results_table([])
    assert isinstance(table, pa.Table)
    assert (table.num_rows, table.schema) == (0, RESULTS_SCHEMA)


def test_contact_sheet_shows_the_face_and_six_frames(rows: tuple[RowView, ...]) -> None:
    sheet = np.asarray(contact_sheet(rows[:1], width=1000)).astype(int)
    # Pictures are tall blocks that are not white; letters and the badge are not tall.
    inked = np.concatenate([[False], (sheet < 250).any(2).sum(0) > 40, [False]])
    edges = np.flatnonzero(np.diff(inked.astype(int)))
    lefts, widths = edges[::2], edges[1::2] - edges[::2]
    assert len(widths) == 7
    assert widths[0] == 1000 // 14
    assert set(widths[1:]) == {widths[1]}
    frames = [sheet[10:60, left : left + widths[1]] for left in lefts[1:]]
    assert min(np.abs(a - b).mean() for a, b in itertools.pairwise(frames)) > 3


def test_contact_sheet_row_without_a_face_shows_its_photo(rows: tuple[RowView, ...]) -> None:
    faceless = replace(rows[0], face=None, read_mp4=None)
    place = np.s_[10:60, 10:60]
    with_photo = np.asarray(contact_sheet([faceless], width=1000))[place]
    without = np.asarray(contact_sheet([replace(faceless, photo=None)], width=1000))[place]
    assert without.min() > 250
    assert with_photo.std() > 20


def test_contact_sheet_of_1000_rows_is_capped_and_says_how_many_are_hidden(rows: tuple[RowView, ...]) -> None:
    row = rows[5]
    full = contact_sheet([row] * MAX_SHEET_ROWS)
    more = contact_sheet([row] * 1000)
    assert full.width == more.width == 1600
    note = np.asarray(more)[full.height :]
    assert 20 < len(note) < 60
    assert (note < 128).any()
    assert more.height < 10_000


def test_render_report_with_hostile_text_leaves_it_inert(rows: tuple[RowView, ...]) -> None:
    html = render_report(run_view(rows))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;document.title=&#39;broken&#39;&lt;/script&gt;" in html


def test_render_report_policy_allows_only_its_own_style_and_embedded_media(rows: tuple[RowView, ...]) -> None:
    html = render_report(run_view(rows))
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert style is not None
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy[1].split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "media-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert ' style="' not in html
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|poster)="([^"]*)"', html))


def test_render_report_refusals_say_what_to_do_with_their_numbers(rows: tuple[RowView, ...]) -> None:
    html = render_report(run_view(rows))
    assert "The face is not sharp enough." in html
    assert "Use a sharper photo" in html
    assert "<dt>min sharpness</dt><dd>0.06</dd>" in html
    assert "The best try is kept and shown here." in html
    assert "a message of its own" in html


def test_render_report_failed_row_names_stage_and_folds_the_traceback(rows: tuple[RowView, ...]) -> None:
    html = render_report(run_view(rows))
    assert "Broke while working on: render." in html
    assert "<pre>Traceback (most recent call last):\n  File &lt;stdin&gt;</pre>" in html


def test_render_report_counts_and_times_come_from_the_rows(rows: tuple[RowView, ...]) -> None:
    html = render_report(run_view(rows))
    assert 'aria-label="2 finished, 3 refused, 1 failed, 1 given up, 1 cancelled"' in html
    assert "<dt>videos finished</dt><dd>2 of 8</dd>" in html
    assert "<dt>run time</dt><dd>5 min 30 s</dd>" in html
    assert "<dt>work per new video</dt><dd>8.0 s</dd>" in html
    assert "<td>6.00 (75%)</td>" in html
    assert sum(float(width) for width in re.findall(r'-fill" x="[\d.]+" y="0" width="([\d.]+)"', html)) == 100


@pytest.mark.parametrize("judged", [True, False])
def test_render_report_says_what_the_model_is_not_and_whether_videos_were_judged(
    rows: tuple[RowView, ...], judged: bool
) -> None:
    html = render_report(run_view(rows, notice="Its people are drawn.", judged=judged))
    assert "<strong>Its people are drawn.</strong>" in html
    assert ("No video was checked against its photo" in html) is not judged
    assert 'class="note"' not in render_report(run_view(rows))


def test_render_report_beyond_its_room_links_videos_and_does_not_read_them(rows: tuple[RowView, ...]) -> None:
    read: list[str] = []

    def row(name: str) -> RowView:
        outcome = rows[0].outcome
        assert isinstance(outcome, Ok)
        size = MAX_EMBEDDED_BYTES // 3

        def read_mp4() -> bytes:
            read.append(name)
            return bytes(size)

        big = replace(outcome, row_id=name, video=replace(outcome.video, num_bytes=size))
        return replace(rows[0], row_id=name, outcome=big, read_mp4=read_mp4, href=f"videos/{name}.mp4")

    html = render_report(run_view((row("a"), row("b"), row("c"))))
    assert read == ["a", "b"]
    assert html.count("<video") == 2
    assert '<a class="screen" href="videos/c.mp4">' in html
    assert len(html) < MAX_EMBEDDED_BYTES + 100_000


def test_render_report_of_1500_rows_is_small_and_hides_finished_rows_first(rows: tuple[RowView, ...]) -> None:
    many = [replace(rows[0], row_id=f"row-{index}") for index in range(1499)]
    html = render_report(run_view((*many, replace(rows[5], row_id="the-dead-one"))))
    assert len(html.encode()) < 25_000_000
    assert html.count('<li class="card') == MAX_CARDS
    assert "500 more rows are in the results table" in html
    assert "the-dead-one" in html


def test_row_view_with_a_script_address_is_refused(rows: tuple[RowView, ...]) -> None:
    with pytest.raises(AssertionError, match="javascript"):
        replace(rows[0], href="javascript:alert(1)")


@pytest.fixture(scope="module")
def page_file(rows: tuple[RowView, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(run_view(rows, judged=False)))
    return path


def open_page(browser: Browser, path: Path, *, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """The loaded page, and what went wrong or over the network while it loaded."""
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme="dark" if scheme == "dark" else "light"
    )
    events: list[str] = []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("data:") else events.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('video')].every(video => video.readyState >= 1)")
    return page, events


def test_report_in_a_browser_asks_for_nothing_and_plays_its_videos(browser: Browser, page_file: Path) -> None:
    page, events = open_page(browser, page_file)
    assert events == [page_file.as_uri()]
    assert page.title() == "spring-run - EchoVideo run report"
    durations = page.evaluate("[...document.querySelectorAll('video')].map(video => video.duration)")
    assert durations == pytest.approx([33 / 16] * 3, abs=0.01)
    sizes = page.evaluate("[...document.querySelectorAll('video')].map(v => [v.videoWidth, v.videoHeight])")
    assert sizes == [[416, 240]] * 3
    played = page.evaluate(
        "async () => { const v = document.querySelector('video'); v.muted = true; await v.play();"
        " while (v.currentTime < 0.1) await new Promise(requestAnimationFrame); return v.currentTime }"
    )
    assert played >= 0.1
    page.close()


def test_report_in_a_browser_filters_rows_without_a_script(browser: Browser, page_file: Path) -> None:
    page, _ = open_page(browser, page_file)
    assert page.locator(".card:visible").count() == 8
    page.get_by_text("Refused 3").click()
    assert page.locator(".card:visible h3").all_inner_texts() == ["blurred", "gated", "odd"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_at_360_px_has_no_sideways_scroll_and_readable_text(
    browser: Browser, page_file: Path, scheme: str
) -> None:
    page, _ = open_page(browser, page_file, width=360, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    # WCAG 2.2, 1.4.3: the contrast of each text against the nearest opaque background behind it.
    contrasts = page.evaluate(
        """() => {
          const rgb = text => text.match(/[\\d.]+/g).map(Number);
          const light = c => c.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = e => {
            for (; e; e = e.parentElement) {
              const c = rgb(getComputedStyle(e).backgroundColor);
              if (c.length === 3 || c[3] === 1) return c;
            }
          };
          return [...document.querySelectorAll('.page *')]
            .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
            .map(e => {
              const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
              return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)];
            });
        }"""
    )
    assert len(contrasts) > 60
    assert [entry for entry in contrasts if entry[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 20, 23)" if scheme == "dark" else "rgb(246, 246, 244)")
    page.close()
