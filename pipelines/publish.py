"""Publishing a run: results table, contact sheet and report, rebuilt from the manifest and the ledger at any time."""

from __future__ import annotations

import io
import os
import posixpath
from datetime import UTC, datetime

import pyarrow.parquet as pq

from pipelines.config import RunConfig
from pipelines.ledger import Ledger
from pipelines.manifest import Manifest
from pipelines.outcome import Ok, Rejected, RowOutcome
from pipelines.report import RowView, RunView, contact_sheet, render_report, results_table
from pipelines.storage import StoragePath

REPORT = "report.html"
RESULTS = "results.parquet"
CONTACT_SHEET = "contact_sheet.png"
_PICTURES = {"photos": "photo", "faces": "face", "posters": "poster"}


def publish(config: RunConfig, manifest: Manifest, ledger: Ledger) -> StoragePath:
    """Write the run's views into its prefix and return the report's path; of a run that goes on, the rows so far."""
    view = _view(config, manifest, ledger)
    table = io.BytesIO()
    pq.write_table(results_table(view.rows), table)
    (ledger.folder / RESULTS).write_bytes(table.getvalue())
    sheet = io.BytesIO()
    contact_sheet(view.rows).save(sheet, "PNG")
    (ledger.folder / CONTACT_SHEET).write_bytes(sheet.getvalue())
    report = ledger.folder / REPORT
    report.write_bytes(render_report(view).encode())
    return report


def _view(config: RunConfig, manifest: Manifest, ledger: Ledger) -> RunView:
    outcomes = ledger.outcomes()
    files = {file.path: file for file in ledger.folder.list_files()}
    pictures = {path for path in files if path.split("/")[0] in _PICTURES}
    ended = [file.modified_s for path, file in files.items() if path.startswith(("outcomes/", "attempts/"))]
    # Until a driver takes its turn, a run has begun with its submission.
    started = next(files[name].modified_s for name in ("epochs/1.json", "run.json") if name in files)

    def row(row_id: str, prompt: str, tags: dict[str, str]) -> RowView:
        outcome = outcomes[row_id]
        video = _video_path(outcome, config)
        shown = {
            name: (ledger.folder / f"{kind}/{row_id}.jpg").read_bytes()
            for kind, name in _PICTURES.items()
            if f"{kind}/{row_id}.jpg" in pictures
        }
        return RowView(
            row_id=row_id,
            prompt=prompt,
            outcome=outcome,
            photo=shown.get("photo"),
            face=shown.get("face"),
            poster=shown.get("poster"),
            tags=tags,
            read_mp4=video.read_bytes if video else None,
            href=posixpath.relpath(str(video), str(ledger.folder)) if video else None,
        )

    rows = [
        (refusal.row_index, row(refusal.row_id, "", {})) for refusal in manifest.refusals if refusal.row_id in outcomes
    ]
    refused = {refusal.row_index for refusal in manifest.refusals}
    places = (index for index in range(len(manifest.requests) + len(refused)) if index not in refused)
    rows += [
        (index, row(request.row_id, request.prompt, dict(request.tags)))
        for index, request in zip(places, manifest.requests, strict=True)
        if request.row_id in outcomes
    ]
    going_on = len(manifest.requests) + len(refused) - len(rows)
    return RunView(
        run_id=config.run_id,
        started=_iso(started),
        finished=_iso(max(ended, default=started)),
        model=config.card.name,
        notice=config.card.notice,
        judged=config.card.judged,
        licence=config.card.licence,
        rows=tuple(view for _, view in sorted(rows, key=lambda item: item[0])),
        settings={
            "manifest": os.path.basename(config.manifest),
            "model digest": config.model_digest[:16],
            "device": config.engine.device,
            "torch threads": config.engine.num_threads,
            "renderers": config.num_renderers,
            "several faces in a photo": config.several_faces,
            "consent required": config.require_consent,
            **({"rows not ended yet": going_on} if going_on else {}),
        },
    )


def _video_path(outcome: RowOutcome, config: RunConfig) -> StoragePath | None:
    video = outcome.video if isinstance(outcome, Ok | Rejected) else None
    return StoragePath.parse(video.uri, config.storage) if video else None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
