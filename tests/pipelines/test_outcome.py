from __future__ import annotations

import json

import pytest

from echovideo.video import Video
from pipelines.outcome import FINAL, Cancelled, Dead, Failed, Ok, Rejected, RowOutcome, from_record, kind_of, to_record

VIDEO = Video(uri="s3://b/v.mp4", sha256="ab" * 32, num_bytes=12, width=848, height=480, num_frames=49, fps=16)
OUTCOMES: list[tuple[str, bool, RowOutcome]] = [
    (
        "ok",
        True,
        Ok(
            row_id="a",
            attempt=2,
            video=VIDEO,
            sidecar_uri="s3://b/v.json",
            seed=2**63 - 1,
            seeds_tried=(42, 2**63 - 1),
            face_similarity=0.75,
            detection_rate=1.0,
            timings={"denoise_s": 1.5},
            reused=True,
        ),
    ),
    ("rejected", True, Rejected(row_id="a", code="no_face", message="no face in \u00fc.jpg")),
    (
        "rejected",
        True,
        Rejected(row_id="a", code="gate", message="m", numbers={"best": 0.1}, video=VIDEO, sidecar_uri="s3://b/v.json"),
    ),
    ("failed", False, Failed(row_id="a", attempt=1, stage="render", code="oom", message="m", traceback="t\nu")),
    ("dead", True, Dead(row_id="a", strikes=3, message="m")),
    ("cancelled", False, Cancelled(row_id="a", attempt=0)),
]


@pytest.mark.parametrize(("kind", "final", "outcome"), OUTCOMES)
def test_outcome_through_json_comes_back_equal(kind: str, final: bool, outcome: RowOutcome) -> None:
    record = json.loads(json.dumps(to_record(outcome)))
    assert record["outcome"] == kind_of(outcome) == kind
    assert from_record(record) == outcome
    assert isinstance(outcome, FINAL) is final


def test_outcome_of_an_unknown_kind_or_field_is_refused() -> None:
    with pytest.raises(KeyError):
        from_record({"outcome": "maybe", "row_id": "a"})
    with pytest.raises(TypeError):
        from_record({"outcome": "dead", "row_id": "a", "strikes": 3, "message": "m", "extra": 1})


def test_video_duration_is_frames_over_rate() -> None:
    assert VIDEO.duration_s == 49 / 16
