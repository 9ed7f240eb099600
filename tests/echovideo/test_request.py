from typing import Any

import pytest

from echovideo.errors import RequestError
from echovideo.request import RenderRequest, frames_for_seconds, parse_size


def request(**changes: Any) -> RenderRequest:
    return RenderRequest(**{"row_id": "a", "prompt": "p", "photo_uri": "x.png", **changes})


@pytest.mark.parametrize(
    ("size", "expected"),
    [("wide", (480, 848)), ("tall", (848, 480)), ("square", (480, 480)), ("96x64", (64, 96)), ("640x480", (480, 640))],
)
def test_size_named_or_written_gives_height_and_width(size: str, expected: tuple[int, int]) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "big", "100x96", "0x16", "4096x4096", "96 x 96", "96X96"])
def test_size_impossible_is_refused_with_the_published_sizes(size: str) -> None:
    with pytest.raises(RequestError, match="wide") as caught:
        parse_size(size)
    assert caught.value.code == "invalid_size"


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"), [(3.0, 16, 49), (1.0, 16, 17), (0.6, 16, 9), (2.0, 8, 17), (3.1, 16, 49)]
)
def test_seconds_are_rounded_to_the_nearest_allowed_count(seconds: float, fps: int, frames: int) -> None:
    assert frames_for_seconds(seconds, fps) == frames


@pytest.mark.parametrize("seconds", [0.0, -1.0, 3.4, 60.0, float("nan")])
def test_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(RequestError, match="allowed are 9 to 49"):
        frames_for_seconds(seconds)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"row_id": "../a"}, "invalid_row_id"),
        ({"row_id": ""}, "invalid_row_id"),
        ({"row_id": "a" * 129}, "invalid_row_id"),
        ({"photo_uri": None}, "invalid_photo"),
        ({"photo_bytes": b"x"}, "invalid_photo"),
        ({"prompt": "  "}, "invalid_prompt"),
        ({"prompt": "x" * 4001}, "invalid_prompt"),
        ({"prompt": "waves \udcff"}, "invalid_prompt"),
        ({"height": 100}, "invalid_size"),
        ({"num_frames": 50}, "invalid_num_frames"),
        ({"num_frames": 57}, "invalid_num_frames"),
        ({"seed": -1}, "invalid_seed"),
        ({"fps": 0}, "invalid_fps"),
        ({"num_inference_steps": 0}, "invalid_num_inference_steps"),
        ({"guidance_scale": 0.5}, "invalid_guidance_scale"),
        ({"guidance_scale": float("nan")}, "invalid_guidance_scale"),
        ({"tier": "best"}, "invalid_tier"),
        ({"guidance_schedule": "wave"}, "invalid_guidance_schedule"),
        ({"face_similarity": 1.5}, "invalid_face_similarity"),
        ({"tries": 17}, "invalid_tries"),
    ],
)
def test_request_bad_value_is_refused_with_its_code(change: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**change)
    assert caught.value.code == code
