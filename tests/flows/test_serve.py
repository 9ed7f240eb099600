"""`echovideo serve` and `echovideo keys`: one command to a service that answers, and an end that loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
from typer.testing import CliRunner

from flows.cli import app
from tests.flows.conftest import free_port

ROOT = Path(__file__).parents[2]


def test_keys_are_created_listed_and_revoked(tmp_path: Path) -> None:
    store = str(tmp_path / "store")

    def run(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(app, ["keys", *arguments, "--json"])
        assert result.exit_code == 0, result.output
        document: dict[str, object] = json.loads(result.output)
        return document

    made = run("create", store, "--tenant", "studio", "--scope", "read", "--scope", "render")
    assert made["scopes"] == ["read", "render"]
    assert str(made["key"]).startswith(f"ev_{made['key_id']}_")
    assert run("list", store)["keys"] == [{"key_id": made["key_id"], "tenant": "studio", "scopes": ["read", "render"]}]
    run("revoke", store, str(made["key_id"]))
    assert run("list", store)["keys"] == []
    refused = CliRunner().invoke(app, ["keys", "create", store, "--tenant", "No Name", "--scope", "read", "--json"])
    assert (refused.exit_code, json.loads(refused.output)["error"]) == (1, "invalid_tenant")


def test_serve_prints_its_address_and_key_renders_and_finishes_what_runs_when_told_to_stop(
    tmp_path: Path, tiny_folder: Path, astronaut_png: bytes
) -> None:
    port = free_port()
    command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", str(tmp_path / "store")]
    command += ["--model", str(tiny_folder), "--device", "cpu", "--port", str(port)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not any(line.startswith("sign in") for line in lines):
            line = process.stdout.readline()
            assert line, "it ended"
            lines.append(line)
        said = "".join(lines)
        key, link = re.search(r"ev_\S+", said), re.search(r"http\S+sign-in\S+", said)
        assert key is not None
        assert link is not None
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert "Sign in" in client.get(link[0]).text
            client.headers["Authorization"] = f"Bearer {key[0]}"
            shape = {"size": "96x96", "num_frames": 9, "num_inference_steps": 12}
            made = client.post(
                "/v1/videos", data={"prompt": "p", **shape}, files={"photo": ("p.png", astronaut_png)}
            ).json()
            with client.stream("GET", f"/v1/videos/{made['id']}/events") as stream:
                for line in stream.iter_lines():
                    if '"status":"in_progress"' in line:
                        break
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    outcome = tmp_path / "store/tenants/local/runs/on-demand/outcomes" / f"{made['id']}.json"
    assert json.loads(outcome.read_text())["outcome"] == "ok"


def test_serve_on_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path, tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["serve", str(tmp_path / "store"), "--model", str(tiny_folder), "--device", "cpu"]
        result = CliRunner().invoke(app, [*arguments, "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "port_in_use" in result.output
