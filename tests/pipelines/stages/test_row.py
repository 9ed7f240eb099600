import pytest

from echovideo.errors import PhotoRefusedError, StorageError
from echovideo.request import RenderRequest
from pipelines.outcome import Failed, Rejected
from pipelines.stages.row import Row, outcome_of_error

REQUEST = RenderRequest(row_id="a", prompt="p", photo_bytes=b"photo", tags={"shot": "3"})


def test_row_columns_read_back_equal() -> None:
    row = Row(request=REQUEST, identity=b"i", condition=b"c", timings={"identity": 0.5})
    assert Row.from_columns(row.to_columns()) == row


def test_row_ended_reads_back_with_its_outcome_and_without_bytes() -> None:
    outcome = Rejected(row_id="a", code="no_face", message="none", numbers={"faces": 0})
    row = Row.from_columns(Row(request=REQUEST, identity=b"i", condition=b"c").ended(outcome).to_columns())
    assert row.outcome == outcome
    assert row.identity is None
    assert row.condition is None


def test_error_of_the_photo_is_final_with_its_code_and_numbers() -> None:
    error = PhotoRefusedError("the face is blurred", code="blurred", numbers={"sharpness": 0.004})
    expected = Rejected(row_id="a", code="blurred", message="the face is blurred", numbers={"sharpness": 0.004})
    assert outcome_of_error(error, "a", "identity", 1) == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("gone", code="not_found"), "not_found"),
        (MemoryError(), "out_of_memory"),
        (KeyError("x"), "unexpected"),
    ],
)
def test_error_of_anything_else_is_an_attempt_that_names_stage_and_trace(error: Exception, code: str) -> None:
    outcome = outcome_of_error(error, "a", "render", 2)
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.stage, outcome.attempt) == (code, "render", 2)
    assert outcome.message
    assert type(error).__name__ in outcome.traceback
