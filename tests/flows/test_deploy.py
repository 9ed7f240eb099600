"""The deployment on a real Prefect server, run by a real worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.conftest import ROOT, end_group, make_manifest, wait_for


def prefect(environment: dict[str, str], *arguments: str) -> None:
    """Run a command of Prefect's own command line."""
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def api(with_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The server's API, with the flow deployed and a worker at work."""
    prefect(with_server, "work-pool", "create", "echovideo", "--type", "process")
    prefect(with_server, "deploy", "--prefect-file", "flows/prefect.yaml", "--name", "nightly")
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "echovideo", "--type", "process"],
            cwd=ROOT,
            env=with_server | {"PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=with_server["PREFECT_API_URL"]) as client:
            yield client
    finally:
        end_group(worker)


def post(api: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """Return the answer's document; a busy server says 503, and is asked again, as Prefect's own client does."""

    def answered() -> httpx.Response | None:
        answer = api.post(path, json=body)
        return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

    answer = wait_for(answered, path)
    answer.raise_for_status()
    return answer.json()


def deployment(api: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = api.get("/deployments/name/render-manifest/nightly").json()
    return found


def test_deployment_triggered_completes_and_leaves_artifacts(
    api: httpx.Client, photos: Path, models: Path, tmp_path: Path
) -> None:
    manifest = make_manifest(tmp_path / "manifest.parquet", photos, {"one": "astronaut.png"}, num_frames=17)
    settings = {"models": str(models), "device": "cpu", "allowed_roots": [str(photos)]}
    parameters = {"manifest": str(manifest), "output": str(tmp_path / "output"), "settings": settings}
    run = post(api, f"/deployments/{deployment(api)['id']}/create_flow_run", {"parameters": parameters})

    def ended() -> dict[str, Any] | None:
        state: dict[str, Any] = api.get(f"/flow_runs/{run['id']}").json()["state"]
        return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    state = wait_for(ended, "the flow run")
    assert (state["type"], state["message"]) == ("COMPLETED", None)
    (run_folder,) = (tmp_path / "output" / "runs").iterdir()
    found = post(api, "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    artifacts = {artifact["key"].removesuffix(f"-{run_folder.name}"): artifact for artifact in found}
    assert artifacts["progress"]["data"] == 100.0
    assert artifacts["outcomes"]["type"] == "table"
    assert '"outcome": "ok"' in artifacts["outcomes"]["data"]
    assert str(run_folder / "report.html") in artifacts["report"]["data"]
    assert len(list((tmp_path / "output").glob("videos/*/*.mp4"))) == 1


def test_deployment_cron_schedule_makes_nightly_runs(api: httpx.Client) -> None:
    wanted = {
        "deployments": {"id": {"any_": [deployment(api)["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }

    def scheduled() -> list[Any]:
        return [run for run in post(api, "/flow_runs/filter", wanted) if run["auto_scheduled"]]

    runs = wait_for(scheduled, "scheduled runs")
    assert {run["expected_start_time"][11:16] for run in runs} == {"02:00"}


def test_deployment_misspelt_setting_is_refused(api: httpx.Client) -> None:
    body = {"parameters": {"manifest": "m", "output": "o", "settings": {"strct": True}}}
    answer = api.post(f"/deployments/{deployment(api)['id']}/create_flow_run", json=body)
    assert answer.status_code == 409
    assert "strct" in answer.text
