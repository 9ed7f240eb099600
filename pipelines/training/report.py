"""Training's views: a data job's table and report, a line and a picture a clip; the report of a learnt person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from echovideo.model.card import ModelCard
from echovideo.training.dataset import DatasetCard
from echovideo.training.trial import TrialVideo
from pipelines import outcome as row_outcome
from pipelines.outcome import KINDS, Failed, Rejected
from pipelines.report import LOOKS, MAX_CARDS, MAX_EMBEDDED_BYTES, Advice, picture_uri, render_page
from pipelines.training.outcome import ClipOutcome, Prepared

_SHEET_SIDE = 960
_TRIAL_SIDE = 1440

ADVICE: Mapping[str, Advice] = {
    "no_face": Advice("No face was found in the footage.", "Use footage that shows the person from the front."),
    "no_reference": Advice(
        "No face in it is good enough as a reference.", "Use sharper, closer, more frontal footage."
    ),
    "several_people": Advice("It is not clear who is meant.", "Cut or crop the footage to one person."),
    "too_short": Advice("The person is not seen long enough in one shot.", "Use longer footage."),
    "too_small": Advice("The picture is too small.", "Use larger footage."),
    "unreadable": Advice("The file cannot be decoded.", "Copy or export it again."),
    "no_caption": Advice("The row has no caption.", "Say what the person does in the clip."),
    "no_clip": Advice("The row names no video file.", "Fill in clip_uri."),
    "consent_missing": Advice("The row names no consent.", "Fill in consent_id."),
    "duplicate_clip_id": Advice("Several rows have the same clip_id.", "Give each row its own."),
    "uri_not_allowed": Advice("This job may not read footage from that address.", "Check the address and the policy."),
}
"""Refusals that people meet, by outcome code; any other code is shown with its own message."""

ONE_CLIP = "The only clip group of this person: training with cross-clip references will refuse the dataset."

_FLOATS = pa.map_(pa.string(), pa.float64())
CLIPS_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("person_id", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("code", pa.string()),
        pa.field("message", pa.string()),
        pa.field("warning", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("bucket", pa.string()),
        pa.field("references", pa.int32()),
        pa.field("shots", pa.int32()),
        pa.field("face_frames", pa.int32()),
        pa.field("footage_sha256", pa.string()),
        pa.field("numbers", _FLOATS),
        pa.field("timings", _FLOATS),
    ],
    metadata={"schema": "echovideo.training.clips", "version": "1"},
)
"""Columns of clips.parquet: the outcome of every row, as pipelines.outcome words it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipView:
    """One clip as the views show it; `read_sheet` fetches its picture, a JPEG, None where there is none."""

    clip_id: str
    person_id: str
    caption: str
    outcome: ClipOutcome
    read_sheet: Callable[[], bytes] | None = None


def kind_of(outcome: ClipOutcome) -> str:
    """Return the outcome's word: "ok", "rejected", "failed", "dead" or "cancelled"."""
    return "ok" if isinstance(outcome, Prepared) else row_outcome.kind_of(outcome)


def clips_table(views: Iterable[ClipView]) -> pa.Table:
    """Return one line per clip in CLIPS_SCHEMA."""
    return pa.Table.from_pylist([_line(view) for view in views], schema=CLIPS_SCHEMA)


def _line(view: ClipView) -> dict[str, Any]:
    outcome = view.outcome
    values: dict[str, Any] = {name: getattr(outcome, name, None) for name in CLIPS_SCHEMA.names}
    for name in ("numbers", "timings"):
        values[name] = None if values[name] is None else list(values[name].items())
    if isinstance(outcome, Prepared):
        values |= {"bucket": outcome.example.bucket, "references": len(outcome.references)}
        values["warning"] = outcome.warning or None
    return {**values, "clip_id": view.clip_id, "person_id": view.person_id, "outcome": kind_of(outcome)}


def render_dataset_report(dataset: DatasetCard, views: Sequence[ClipView]) -> str:
    """Return the dataset as one HTML page that needs nothing else: no request, no script.

    Clips that gave nothing come first. Pictures are embedded up to MAX_EMBEDDED_BYTES, and MAX_CARDS clips are shown.
    """
    counts = Counter(kind_of(view.outcome) for view in views)
    prepared = [view.outcome for view in views if isinstance(view.outcome, Prepared)]
    shown = sorted(views, key=lambda view: isinstance(view.outcome, Prepared))[:MAX_CARDS]
    return render_page(
        "dataset.html.j2",
        dataset=dataset,
        figures=[
            ("examples", len(prepared)),
            ("people", len({outcome.example.person_id for outcome in prepared})),
            ("references", sum(len(outcome.references) for outcome in prepared)),
            ("people with one clip group", len({o.example.person_id for o in prepared if o.warning})),
        ],
        counts=[(kind, LOOKS[kind], counts[kind]) for kind in KINDS if counts[kind]],
        total=len(views),
        cards=_cards(shown),
        num_hidden=len(views) - len(shown),
    )


def _cards(views: Sequence[ClipView]) -> Iterable[dict[str, Any]]:
    room = MAX_EMBEDDED_BYTES
    for view in views:
        outcome = view.outcome
        sheet = picture_uri(view.read_sheet(), _SHEET_SIDE) if view.read_sheet and room > 0 else None
        room -= len(sheet or "")
        yield {
            "view": view,
            "kind": kind_of(outcome),
            "look": LOOKS[kind_of(outcome)],
            "sheet": sheet,
            "advice": ADVICE.get(outcome.code) if isinstance(outcome, Rejected | Failed) else None,
            "message": getattr(outcome, "message", None),
            "traceback": getattr(outcome, "traceback", None),
            "warning": ONE_CLIP if isinstance(outcome, Prepared) and outcome.warning else None,
            "facts": _facts(outcome) if isinstance(outcome, Prepared) else [],
        }


def _facts(outcome: Prepared) -> list[tuple[str, str]]:
    example = outcome.example
    return [
        ("example", f"{example.width} x {example.height}, {example.num_frames} frames"),
        ("references", ", ".join(f"frame {reference.frame_index}" for reference in outcome.references)),
        ("shots in the file", str(outcome.shots)),
        ("frames with the face", str(outcome.face_frames)),
        ("consent", example.consent_id),
    ]


def render_trial_report(
    name: str,
    facts: Mapping[str, object],
    videos: Sequence[TrialVideo],
    scores: Mapping[str, Any],
    sheet: bytes,
    card: ModelCard,
) -> str:
    """Return the page of a learnt person: scores with and without the adapter, those of validation, a sheet of frames.

    `sheet` is a PNG, `card` the base model's.
    """
    return render_page(
        "trial.html.j2",
        name=name,
        facts=facts,
        videos=videos,
        scores=scores,
        sheet=picture_uri(sheet, _TRIAL_SIDE),
        card=card,
    )
