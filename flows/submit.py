"""Submitting a run: a child process on this machine, or one idempotent job on a Ray cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, Protocol

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from echovideo.errors import RunError
from pipelines.config import RunConfig
from pipelines.ledger import Ledger

Status = Literal["running", "succeeded", "failed"]

_STOP_GRACE_S = 10.0
_TAIL_BYTES = 4096


class Submission(Protocol):
    """A run's driver at work somewhere; `place` says where, for a person."""

    place: str

    def poll(self) -> Status:
        """Return whether the driver still runs, or how it ended."""

    def stop(self) -> None:
        """End the driver now; what is committed stays, and the next submission resumes."""

    def log_tail(self) -> str:
        """Return the last lines that the driver printed."""


class LocalSubmission:
    """A driver in a child process with a session of its own, so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._log_start = file.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid
        self.place = f"process {self.pid} of this machine, log {log}"

    def poll(self) -> Status:
        """Return the child's status; what a dead one left running is ended with it."""
        returncode = self._process.poll()
        if returncode is None:
            return "running"
        if returncode == 0:
            return "succeeded"
        self._kill_group()
        return "failed"

    def stop(self) -> None:
        """End the child, by force if it does not end in ten seconds."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._kill_group()

    def log_tail(self) -> str:
        """Return the end of what this child wrote to the log."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - _TAIL_BYTES))
            return file.read().decode(errors="replace")

    def _kill_group(self) -> None:
        # Ray's own processes are in the child's group and would outlive a killed driver by a minute.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class ClusterSubmission:
    """A driver that runs as a job of a Ray cluster."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client = client
        self.job_id = job_id
        self.place = f"job {job_id} of the Ray cluster at {client.get_address()}"

    def poll(self) -> Status:
        """Return the job's status."""
        status = self._client.get_job_status(self.job_id)
        if not status.is_terminal():
            return "running"
        return "succeeded" if status == JobStatus.SUCCEEDED else "failed"

    def stop(self) -> None:
        """Ask the cluster to end the job."""
        self._client.stop_job(self.job_id)

    def log_tail(self) -> str:
        """Return the end of the job's log."""
        return self._client.get_job_logs(self.job_id)[-_TAIL_BYTES:]


def submit(config: RunConfig, *, jobs_address: str | None = None, logs: Path | None = None) -> Submission:
    """Record the run and start its driver: here, or as a job of the cluster whose jobs server is at `jobs_address`.

    A cluster's job that already works on the run is followed, not doubled. `logs` is the folder of local drivers'
    logs. Raises RunError `cluster_unreachable`, `cluster_unauthorised` or `job_refused`.
    """
    ledger = Ledger(config.output_path, config.run_id)
    ledger.write_config(config.to_record())
    arguments = ["-m", "pipelines.run", str(ledger.folder / "run.json")]
    if config.storage.endpoint_url:
        arguments += ["--endpoint-url", config.storage.endpoint_url]
    if jobs_address is None:
        return LocalSubmission([sys.executable, *arguments], (logs or default_logs()) / f"{config.run_id}.log")
    return _submit_job(config.run_id, shlex.join(["python", *arguments]), jobs_address)


def default_logs() -> Path:
    """Return this user's folder of local drivers' logs."""
    return Path(tempfile.gettempdir()) / f"echovideo-logs-{os.getuid()}"


def _submit_job(run_id: str, entrypoint: str, jobs_address: str) -> ClusterSubmission:
    try:
        client = JobSubmissionClient(jobs_address)
        known = {job.submission_id: job for job in client.list_jobs()}
    except AuthenticationError as error:
        raise RunError(
            f"the Ray cluster at {jobs_address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
            code="cluster_unauthorised",
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise RunError(
            f"no Ray jobs server answers at {jobs_address}: {error}; give its http:// address, usually port 8265",
            code="cluster_unreachable",
        ) from error
    turn = 1
    while (job_id := f"echovideo-{run_id}-{turn}") in known:
        if not known[job_id].status.is_terminal():
            return ClusterSubmission(client, job_id)
        turn += 1
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job_id)
    except RuntimeError as error:
        # The id is the lock: if it exists now, somebody submitted the same run this moment, and that job is followed.
        if job_id not in {job.submission_id for job in client.list_jobs()}:
            raise RunError(f"the Ray cluster at {jobs_address} refused the job: {error}", code="job_refused") from error
    return ClusterSubmission(client, job_id)
