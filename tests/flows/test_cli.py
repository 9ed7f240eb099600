"""Commands that need no batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from echovideo.tiny.folder import tiny_folder
from flows.cli import app
from tests.flows.conftest import ROOT


def test_help_loads_no_heavy_package() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app\n"
        "result = CliRunner().invoke(app, ['batch', 'run', '--help'])\n"
        "assert result.exit_code == 0 and 'consent' in result.stdout, result.output\n"
        "print(sorted({'torch', 'ray', 'prefect', 'pyarrow', 'numpy', 's3fs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_render_bad_size_says_what_is_allowed_and_exits_1(photos: Path) -> None:
    arguments = ["render", str(photos / "astronaut.png"), "waves", "--size", "97x96"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "Error [invalid_size] width 97 is not a multiple of 16" in result.stderr
    assert CliRunner().invoke(app, [*arguments, "--json"]).stdout.startswith('{\n "error": "invalid_size"')


def test_render_model_that_was_never_pulled_says_how_to_get_it(photos: Path) -> None:
    result = CliRunner().invoke(
        app, ["render", str(photos / "astronaut.png"), "waves", "--model", "owner/never-pulled", "--json"]
    )
    document = json.loads(result.stdout)
    assert (result.exit_code, document["error"]) == (1, "model_not_pulled")
    assert "echovideo models pull owner/never-pulled" in document["message"]


def test_identity_portrait_draws_picture_and_numbers(photos: Path, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    result = CliRunner().invoke(
        app, ["identity", str(photos / "astronaut.png"), "--out", str(out), "--models", str(models), "--json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    left, top, right, bottom = document["box"]
    assert left < 220 < right
    assert top < 120 < bottom
    assert document["quality"]["detection_score"] > 0.9
    with Image.open(out) as picture:
        assert picture.height == 512


@pytest.mark.parametrize(("command", "name"), [(["render", "waves"], "a.json"), (["identity"], "a.txt")])
def test_out_that_cannot_hold_the_result_is_refused_first(
    command: list[str], name: str, photos: Path, tmp_path: Path
) -> None:
    for out, words in ((tmp_path / name, f"--out {tmp_path / name} is "), (tmp_path, "is a directory")):
        arguments = [command[0], str(photos / "astronaut.png"), *command[1:], "--out", str(out)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "500"})
        assert result.exit_code == 2
        assert words in result.stderr


def test_identity_photo_of_nobody_is_refused_with_reason(photos: Path, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    result = CliRunner().invoke(
        app, ["identity", str(photos / "coffee.png"), "--out", str(out), "--models", str(models)]
    )
    assert result.exit_code == 1
    assert "Error [no_face] no face was found in the photo" in result.stderr
    assert "faces 0" in result.stderr
    assert not out.exists()


def test_doctor_healthy_machine_exits_0_and_is_honest_about_the_gpu(models: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--models", str(models), "--json"])
    document = json.loads(result.stdout)
    found = {check["name"]: check["status"] for check in document["checks"]}
    assert (result.exit_code, document["ok"]) == (0, True), document
    assert found["CUDA GPU"] == ("ok" if torch.cuda.is_available() else "absent")
    kernels = "kernel attention" if torch.cuda.is_available() else "kernels"
    assert found[kernels] == ("ok" if torch.cuda.is_available() else "absent")
    assert {found[name] for name in ("H.264 encoder", "face nets", "tiny model", "models folder")} == {"ok"}


def test_doctor_folder_that_cannot_be_written_exits_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = CliRunner().invoke(app, ["doctor", "--models", str(tmp_path / "file" / "models"), "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"]) == (1, False)
    assert [check["name"] for check in document["checks"] if check["status"] == "missing"] == ["models folder"]


def test_models_pull_tiny_prints_its_folder(models: Path) -> None:
    result = CliRunner().invoke(app, ["models", "pull", "tiny", "--models", str(models), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"folders": {"tiny": str(tiny_folder(models))}}


def test_models_pull_unreachable_hub_is_an_error_without_traceback() -> None:
    # The hub's address is read when its client is imported, so it takes a process of its own.
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "models", "pull", "owner/name", "--json"],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)["error"]) == (1, "hub_unreachable")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["status", "report", "cancel"])
def test_batch_command_output_without_runs_says_so(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["batch", command, str(tmp_path)])
    assert result.exit_code == 1
    assert f"Error [no_run] there is no run under {tmp_path}" in result.stderr


def test_identities_delete_takes_the_footage_of_a_training_that_never_ended(tmp_path: Path) -> None:
    shard = tmp_path / "training" / "ann" / "data" / "shard"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"faces")
    arguments = ["identities", "delete", str(tmp_path), "ann", "--yes"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert not shard.exists()
    assert "Error [unknown_identity]" in CliRunner().invoke(app, arguments).stderr
