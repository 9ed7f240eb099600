"""Drivers as child processes and as jobs of a real Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from echovideo.errors import RunError
from echovideo.model.card import ModelCard
from flows.submit import ClusterSubmission, LocalSubmission, submit
from pipelines.config import RunConfig
from pipelines.ledger import Ledger
from tests.flows.conftest import ROOT, free_port, make_manifest, wait_for


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended but is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> RunConfig:
    """A run that its driver refuses at once, since the manifest is not the one that was submitted."""
    manifest = make_manifest(tmp_path / "manifest.parquet", photos, {"one": "astronaut.png"})
    return RunConfig(
        manifest=str(manifest),
        manifest_digest="0" * 64,
        output=str(tmp_path / "out"),
        model="",
        model_digest="",
        card=ModelCard(),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of the jobs server of a real one-machine Ray cluster of its own."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    ports |= {"dashboard-agent-listen-port": free_port(), "dashboard-agent-grpc-port": free_port()}
    folder = tempfile.mkdtemp(prefix="ray-")
    process = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            "--disable-usage-stats",
        ]
        + [f"--temp-dir={folder}", "--include-dashboard=true"]
        + [f"--{name}={port}" for name, port in ports.items()],
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "RAY_AUTH_MODE": "disabled",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"

    def answers() -> bool:
        try:
            return JobSubmissionClient(address).list_jobs() == []
        except (ConnectionError, RuntimeError):
            return False

    try:
        wait_for(answers, "the Ray cluster", timeout_s=90)
        yield address
    finally:
        # Asked politely, a node drains for half a minute first.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_submit_local_driver_that_refuses_leaves_its_reason_in_the_log(config: RunConfig, tmp_path: Path) -> None:
    submission = submit(config, logs=tmp_path / "logs")
    status = wait_for(lambda: submission.poll() if submission.poll() != "running" else None, "the driver")
    assert status == "failed"
    assert '{"error": "manifest_changed"' in submission.log_tail()
    assert (tmp_path / "logs" / f"{config.run_id}.log").read_text() == submission.log_tail()


def test_submit_again_with_more_renderers_records_them_for_the_driver(config: RunConfig, tmp_path: Path) -> None:
    submit(config, logs=tmp_path / "logs").stop()
    submit(replace(config, num_renderers=2), logs=tmp_path / "logs").stop()
    recorded = Ledger(config.output_path, config.run_id).read_config()
    assert RunConfig.from_record(recorded) == replace(config, num_renderers=2)


def test_local_submission_stop_ends_the_driver_and_what_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    submission = LocalSubmission([sys.executable, "-c", script], tmp_path / "log")
    grandchild = int(wait_for(submission.log_tail, "the grandchild's pid"))
    assert submission.poll() == "running"
    submission.stop()
    assert submission.poll() == "failed"
    wait_for(lambda: not is_alive(grandchild), "the grandchild's end", timeout_s=10)


def test_submit_cluster_that_does_not_answer_is_an_error(config: RunConfig) -> None:
    with pytest.raises(RunError) as refusal:
        submit(config, jobs_address=f"http://127.0.0.1:{free_port()}")
    assert refusal.value.code == "cluster_unreachable"


def test_submit_cluster_follows_a_running_job_and_numbers_the_next(config: RunConfig, cluster: str) -> None:
    client = JobSubmissionClient(cluster)
    first = f"echovideo-{config.run_id}-1"
    client.submit_job(entrypoint="sleep 600", submission_id=first)
    followed = submit(config, jobs_address=cluster)
    assert isinstance(followed, ClusterSubmission)
    assert (followed.job_id, followed.poll()) == (first, "running")
    followed.stop()
    wait_for(lambda: followed.poll() == "failed", "the job's end")

    following = submit(config, jobs_address=cluster)
    assert isinstance(following, ClusterSubmission)
    assert following.job_id == f"echovideo-{config.run_id}-2"
    wait_for(lambda: following.poll() == "failed", "the driver's refusal")
    assert '{"error": "manifest_changed"' in following.log_tail()
