"""The flow that renders a manifest: validate, submit one driver, follow the ledger, publish artifacts.

No row ever becomes a Prefect task: rows live in the ledger, and running the flow again resumes there.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from prefect import flow
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from echovideo.errors import RunError
from flows.config import BatchSettings, plan_run
from flows.submit import Submission, submit
from pipelines.ledger import Ledger
from pipelines.outcome import FINAL, KINDS, Dead, Failed, Ok, Rejected, RowOutcome, kind_of
from pipelines.publish import REPORT, RESULTS

POLL_S = 1.0
_CANCEL_GRACE_S = 20.0
"""How long a cancelled flow waits for its driver; Prefect kills the flow after 30 s, the driver goes on to its end."""
_MAX_TABLE_ROWS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A run that was submitted: its ledger, how many rows it has, and its driver."""

    ledger: Ledger
    num_rows: int
    submission: Submission

    @property
    def report(self) -> str:
        """Address of the report."""
        return str(self.ledger.folder / REPORT)

    @property
    def results(self) -> str:
        """Address of the results table."""
        return str(self.ledger.folder / RESULTS)


class Watcher(Protocol):
    """Who is told, in the flow's own thread, how the flow's batch goes; see `watcher`."""

    def started(self, batch: Batch) -> None:
        """Told once, when the driver has been submitted."""

    def progressed(self, batch: Batch, counts: Mapping[str, int]) -> None:
        """Told about once a second, with the rows that have ended by outcome."""

    def ended(self, batch: Batch, counts: Mapping[str, int]) -> None:
        """Told once, when the driver has ended well and the report lies ready."""


watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
"""Set by a caller that runs the flow in its own process, since a flow's parameters can only be JSON."""


@flow(name="render-manifest", flow_run_name="render {manifest}", persist_result=False)
def render_manifest(
    manifest: str, output: str, model: str = "tiny", settings: BatchSettings | None = None
) -> dict[str, int] | State[Any]:
    """Render every row of a Parquet manifest and return the counts by outcome.

    Args:
        manifest: Path or s3:// address of the manifest.
        output: Folder or s3:// prefix that holds all runs and videos of one owner.
        model: "tiny", a model folder, or a hub model fetched before.
        settings: Everything else; see BatchSettings.

    The flow fails, and can be run again to resume, when the driver died or rows failed (RunError `driver_died`,
    `rows_failed`, or the driver's own code). It ends Cancelled when the run was cancelled.
    """
    settings = settings or BatchSettings()
    config, checked = plan_run(manifest, output, model, settings)
    ledger = Ledger(config.output_path, config.run_id)
    ledger.withdraw_cancel()
    # An attempt that an earlier turn left behind is no progress of this one.
    left_behind = {row_id: outcome for row_id, outcome in ledger.outcomes().items() if not isinstance(outcome, FINAL)}
    batch = Batch(
        ledger=ledger,
        num_rows=len(checked.requests) + len(checked.refusals),
        submission=submit(config, jobs_address=settings.jobs_address),
    )
    try:
        counts = _follow(batch, left_behind)
    except TerminationSignal:
        ledger.request_cancel()
        _wait(batch.submission, _CANCEL_GRACE_S)
        raise
    except KeyboardInterrupt:
        batch.submission.stop()
        raise
    _publish(batch)
    told = watcher.get()
    if told is not None:
        told.ended(batch, counts)
    if counts["failed"] or counts["dead"]:
        raise RunError(
            f"{counts['failed'] + counts['dead']} of {batch.num_rows} rows failed; {batch.report} says why, and "
            "running the same manifest again retries those that can be",
            code="rows_failed",
            numbers=counts,
        )
    if counts["cancelled"]:
        return Cancelled(message=f"{counts['cancelled']} of {batch.num_rows} rows were cancelled; run again to resume")
    return counts


def _follow(batch: Batch, left_behind: Mapping[str, RowOutcome]) -> dict[str, int]:
    """Keep the progress artifact and the watcher told until the driver ends, and return the final counts."""
    told = watcher.get()
    if told is not None:
        told.started(batch)
    artifact = create_progress_artifact(0.0, key=f"progress-{batch.ledger.run_id}", description="Rows that have ended")
    assert isinstance(artifact, UUID)
    shown = 0
    while True:
        status = batch.submission.poll()
        outcomes = batch.ledger.outcomes()
        fresh = [outcome for row_id, outcome in outcomes.items() if outcome != left_behind.get(row_id)]
        if len(fresh) != shown:
            shown = len(fresh)
            update_progress_artifact(artifact, 100.0 * shown / batch.num_rows)
        if told is not None:
            told.progressed(batch, _count(fresh))
        if status == "failed":
            raise _driver_error(batch)
        if status == "succeeded":
            return _count(outcomes.values())
        time.sleep(POLL_S)


def _count(outcomes: Iterable[RowOutcome]) -> dict[str, int]:
    counted = Counter(kind_of(outcome) for outcome in outcomes)
    return {kind: counted[kind] for kind in KINDS}


def _wait(submission: Submission, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while submission.poll() == "running" and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _driver_error(batch: Batch) -> RunError:
    """Return the driver's own error, which it prints last as JSON, or else `driver_died` with the end of its log."""
    tail = batch.submission.log_tail().strip()
    for line in reversed(tail.splitlines()):
        if line.startswith('{"error": '):
            record = json.loads(line)
            return RunError(record["message"], code=record["error"])
    return RunError(
        f"the driver of run {batch.ledger.run_id} ({batch.submission.place}) died; every committed row is kept, and "
        f"running the same manifest again resumes. The end of its log:\n{tail or '(it printed nothing)'}",
        code="driver_died",
    )


def _publish(batch: Batch) -> None:
    """Leave the outcomes and the way to the report in Prefect.

    Codes stand for reasons: a message may quote a photo's address, and Prefect is no place for that.
    """
    outcomes = batch.ledger.outcomes()
    counts = _count(outcomes.values())
    rows = [
        {"row": f"all {batch.num_rows}", "outcome": kind, "reason": "", "rows": number}
        for kind, number in counts.items()
        if number
    ]
    troubled = [(row_id, outcome) for row_id, outcome in sorted(outcomes.items()) if not isinstance(outcome, Ok)]
    rows += [
        {"row": row_id, "outcome": kind_of(outcome), "reason": _reason(outcome), "rows": 1}
        for row_id, outcome in troubled[:_MAX_TABLE_ROWS]
    ]
    left_out = len(troubled) - _MAX_TABLE_ROWS
    create_table_artifact(
        rows,
        key=f"outcomes-{batch.ledger.run_id}",
        description=f"How the rows ended{f'; {left_out} more are in the report' if left_out > 0 else ''}",
    )
    report = batch.report if "://" in batch.report else f"file://{batch.report}"
    create_link_artifact(
        report,
        link_text=batch.report,
        key=f"report-{batch.ledger.run_id}",
        description=f"Report; the results table is {batch.results}",
    )


def _reason(outcome: RowOutcome) -> str:
    match outcome:
        case Rejected():
            return outcome.code
        case Failed():
            return f"{outcome.code} in {outcome.stage}"
        case Dead():
            return f"took its worker down {outcome.strikes} times"
        case _:
            return ""
