"""Whole batches through the command line as a process: killed, resumed, cancelled, refused, deleted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from echovideo.model.card import TINY
from echovideo.video import decode_mp4
from flows.cli import app
from tests.flows.conftest import Command, Running, make_manifest, wait_for

ROWS = {
    "astronaut-1": "astronaut.png",
    "astronaut-2": "astronaut.png",
    "admiral-1": "admiral.jpg",
    "admiral-2": "admiral.jpg",
    "nobody": "coffee.png",
}


def run_folder(output: Path) -> Path:
    """Return the folder of an output's only run."""
    (folder,) = (output / "runs").iterdir()
    return folder


def first_video(output: Path) -> bool:
    """Tell whether a video has been committed."""
    return any(json.loads(path.read_text())["outcome"] == "ok" for path in output.glob("runs/*/outcomes/*.json"))


def claims(output: Path, row_id: str) -> list[str]:
    """Return the names of a row's claims: one for each time a stage took it up."""
    return sorted(path.name for path in (run_folder(output) / "claims" / row_id).iterdir())


@contextmanager
def running(arguments: list[str], environment: dict[str, str]) -> Iterator[Running]:
    """Run a command, and leave nothing of it behind."""
    command = Running(arguments, environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A batch whose driver was killed after the first video, and that was then run again."""

    output: Path
    driver_pid: int
    killed: Command
    committed_at_kill: dict[str, tuple[bytes, list[str]]]
    resumed: Command


@pytest.fixture(scope="module")
def story(photos: Path, with_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Kill a batch's driver as soon as one video is committed, then run the same command again."""
    folder = tmp_path_factory.mktemp("story")
    # The first row to be taken up is quick, so that others are under way when it is done.
    manifest = make_manifest(folder / "manifest.parquet", photos, ROWS, steps=6, quick="admiral-1")
    output = folder / "output"
    arguments = ["batch", "run", str(manifest), str(output), "--allow-root", str(photos), "--device", "cpu"]
    with running(arguments, with_server) as command:
        wait_for(lambda: first_video(output), "the first video")
        driver = json.loads((run_folder(output) / "epochs" / "1.json").read_text())
        os.kill(driver["pid"], signal.SIGKILL)
        killed = command.end()
    committed = {
        path.stem: (path.read_bytes(), claims(output, path.stem))
        for path in (run_folder(output) / "outcomes").glob("*.json")
    }
    with running(arguments, with_server) as command:
        resumed = command.end()
    return Story(output=output, driver_pid=driver["pid"], killed=killed, committed_at_kill=committed, resumed=resumed)


def test_batch_run_driver_killed_fails_with_log_and_way_to_resume(story: Story) -> None:
    assert story.killed.status == 1
    assert story.killed.document["error"] == "driver_died"
    assert "running the same manifest again resumes" in story.killed.document["message"]
    assert f"process {story.driver_pid} of this machine" in story.killed.document["message"]
    assert "Started a local Ray instance" in story.killed.document["message"]
    assert 0 < len(story.committed_at_kill) < len(ROWS)


def test_batch_run_again_gives_every_row_one_outcome_and_repeats_none(story: Story) -> None:
    assert story.resumed.status == 0, story.resumed.stderr
    counts = story.resumed.document["counts"]
    assert counts == {"ok": 4, "rejected": 1, "failed": 0, "dead": 0, "cancelled": 0}
    outcomes = run_folder(story.output) / "outcomes"
    assert sorted(path.stem for path in outcomes.iterdir()) == sorted(ROWS)
    for row_id, (record, names) in story.committed_at_kill.items():
        assert (outcomes / f"{row_id}.json").read_bytes() == record
        assert claims(story.output, row_id) == names
    assert len(list(story.output.glob("videos/*/*.mp4"))) == 4


def test_batch_run_document_says_where_everything_is(story: Story) -> None:
    document = story.resumed.document
    assert (document["rows"], document["waiting"]) == (5, 0)
    assert [(row["row_id"], row["code"]) for row in document["without_video"]] == [("nobody", "no_face")]
    assert document["model"] == asdict(TINY)
    assert Path(document["report"]).read_text().startswith("<!doctype html>")
    assert pq.read_table(document["results"]).num_rows == 5


def test_render_one_gives_the_batch_s_own_frames(story: Story, photos: Path, models: Path, tmp_path: Path) -> None:
    ok = json.loads((run_folder(story.output) / "outcomes" / "astronaut-2.json").read_text())
    out = tmp_path / "one.mp4"
    arguments = ["render", str(photos / "astronaut.png"), "A person waves", "--out", str(out), "--size", "96x96"]
    arguments += ["--frames", "9", "--steps", "6", "--seed", "1", "--device", "cpu", "--models", str(models), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["video"]["num_frames"], document["video"]["width"], document["video"]["fps"]) == (9, 96, 16)
    assert document["model"] == asdict(TINY)
    assert json.loads(out.with_suffix(".json").read_text())["video"]["sha256"] == document["video"]["sha256"]
    # The two files differ in what their metadata say; the pictures may not.
    assert (decode_mp4(out) == decode_mp4(Path(ok["video"]["uri"]))).all()


def test_batch_status_finished_run_shows_counts_and_videos(story: Story) -> None:
    result = CliRunner().invoke(app, ["batch", "status", str(story.output)])
    assert result.exit_code == 0, result.output
    assert "5 rows: 4 ok  1 rejected" in result.stdout
    assert "no face was found" in result.stdout
    assert "a drawn world" in result.stderr


def test_batch_report_deleted_view_is_written_again(story: Story, tmp_path: Path) -> None:
    output = shutil.copytree(story.output, tmp_path / "output")
    (run_folder(output) / "report.html").unlink()
    result = CliRunner().invoke(app, ["batch", "report", str(output), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"] == str(run_folder(output) / "report.html")
    assert "astronaut-1" in (run_folder(output) / "report.html").read_text()


def test_batch_delete_asks_then_leaves_nothing(story: Story, tmp_path: Path) -> None:
    output = shutil.copytree(story.output, tmp_path / "output")
    run_id = run_folder(output).name
    refused = CliRunner().invoke(app, ["batch", "delete", str(output), run_id], input="n\n")
    assert refused.exit_code == 1
    assert run_folder(output).is_dir()
    result = CliRunner().invoke(app, ["batch", "delete", str(output), run_id, "--yes", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"run_id": run_id, "deleted": True}
    assert [path for path in output.rglob("*") if path.is_file()] == []


def test_batch_run_interrupted_cancels_politely_and_keeps_videos(
    photos: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    # Without a Prefect server of the user's own: the one that the flow starts must outlive the terminal's Ctrl-C.
    rows = {name: photo for name, photo in ROWS.items() if name != "nobody"}
    manifest = make_manifest(tmp_path / "manifest.parquet", photos, rows, steps=30, quick="admiral-1")
    output = tmp_path / "output"
    arguments = ["batch", "run", str(manifest), str(output), "--allow-root", str(photos), "--device", "cpu"]
    with running(arguments, environment) as command:
        wait_for(lambda: first_video(output), "the first video")
        command.interrupt()
        cancelled = command.end()
    assert cancelled.status == 2, cancelled.stderr
    counts = cancelled.document["counts"]
    assert counts["ok"] >= 1
    assert counts["cancelled"] >= 1
    assert counts["ok"] + counts["cancelled"] == 4
    assert len(list(output.glob("videos/*/*.mp4"))) == counts["ok"]
    assert (run_folder(output) / "report.html").is_file()


def test_batch_run_prefect_server_that_is_down_is_an_error(
    photos: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    manifest = make_manifest(tmp_path / "manifest.parquet", photos, {"one": "astronaut.png"})
    nowhere = environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    with running(["batch", "run", str(manifest), str(tmp_path / "output")], nowhere) as command:
        refused = command.end()
    assert (refused.status, refused.document["error"]) == (1, "prefect_unreachable")


def test_batch_run_strict_with_a_bad_row_is_refused_before_anything_is_written(
    photos: Path, with_server: dict[str, str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    manifest = make_manifest(elsewhere / "manifest.parquet", photos, {"one": "astronaut.png"})
    with running(["batch", "run", str(manifest), str(tmp_path / "output"), "--strict"], with_server) as command:
        refused = command.end()
    assert (refused.status, refused.document["error"]) == (1, "refused_rows")
    assert "is in no allowed folder" in refused.document["message"]
    assert not (tmp_path / "output").exists()
    assert "Traceback" not in refused.stderr
