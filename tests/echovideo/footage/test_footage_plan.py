"""Plans are made of numbers, so these tests invent what was seen: faces with embeddings far apart or close."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest

from echovideo.faces.analyzer import FrameFace
from echovideo.footage.plan import FootageSettings, plan_take, settings_for
from echovideo.footage.scan import FootageError, Scan, Sighting
from echovideo.model.config import TransformerConfig
from echovideo.tiny.parts import tiny_config

SETTINGS = FootageSettings(num_frames=17)
ANN, BOB = (1.0, 0.0), (0.0, 1.0)
POINTS = np.array([[-1, 0], [1, 0], [0, 1.1], [-0.8, 2.3], [0.8, 2.3]], dtype=np.float32)


def face(who: tuple[float, float] = ANN, x: float = 960, y: float = 500, side: float = 200) -> FrameFace:
    half = side / 2
    return FrameFace(
        embedding=np.array(who, dtype=np.float32),
        box=(x - half, y - half, x + half, y + half),
        landmarks=POINTS * np.float32(side / 5) + np.array([x, y - side / 5], dtype=np.float32),
        score=1.0,
    )


def scan(
    frames: Sequence[Sequence[FrameFace]], cuts: Sequence[int] = (), *, width: int = 1920, height: int = 1080
) -> Scan:
    return Scan(
        width=width,
        height=height,
        pack="antelopev2-0",
        sightings=tuple(
            Sighting(frame_index=2 * at, difference=0.8 if at in cuts else 0.02, faces=tuple(faces))
            for at, faces in enumerate(frames)
        ),
    )


def refusal(seen: Scan, settings: FootageSettings = SETTINGS) -> FootageError:
    with pytest.raises(FootageError) as caught:
        plan_take(seen, settings)
    return caught.value


def test_plan_takes_the_middle_of_the_longest_run() -> None:
    plan = plan_take(scan([[face()]] * 27), SETTINGS)
    assert plan.frame_indices == tuple(range(10, 44, 2))
    assert (plan.shots, plan.face_frames) == (1, 27)


def test_plan_never_crosses_a_cut() -> None:
    plan = plan_take(scan([[face()]] * 40, cuts=[20]), SETTINGS)
    assert plan.shots == 2
    assert plan.frame_indices in (tuple(range(2, 36, 2)), tuple(range(42, 76, 2)))
    error = refusal(scan([[face()]] * 32, cuts=[16]))
    assert (error.code, error.numbers) == ("too_short", {"run_frames": 16, "frames_needed": 17, "shots": 2})


def test_fast_movement_is_no_cut() -> None:
    moving = scan([[face()]] * 20)
    moving = replace(moving, sightings=tuple(replace(item, difference=0.5) for item in moving.sightings))
    assert plan_take(moving, SETTINGS).shots == 1


def test_face_missing_for_two_frames_is_bridged_with_a_box_between_and_for_three_is_not() -> None:
    frames = [[face(x=100.0 * (at + 3))] for at in range(17)]
    plan = plan_take(scan([*frames[:8], [], [], *frames[10:]]), SETTINGS)
    assert [at for at, found in enumerate(plan.faces) if found is None] == [8, 9]
    assert plan.boxes[8] == pytest.approx(face(x=1100).box)
    assert refusal(scan([*frames[:7], [], [], [], *frames[10:]])).code == "too_short"


def test_nobody_and_faces_under_the_limit_are_no_face() -> None:
    assert refusal(scan([[]] * 30)).code == "no_face"
    error = refusal(scan([[face(side=40)]] * 30))
    assert error.code == "no_face"
    assert "48 px" in error.message


def test_second_face_beside_the_person_is_several_people_even_if_they_look_alike() -> None:
    for who in (BOB, ANN):
        assert refusal(scan([[face(x=500), face(who, x=1400, side=190)]] * 20)).code == "several_people"


def test_small_face_in_the_background_and_a_passer_by_do_not_matter() -> None:
    assert plan_take(scan([[face(), face(BOB, x=300, side=60)]] * 20), SETTINGS).face_frames == 20
    passing = [[face(), face(BOB, x=300)]] * 3 + [[face()]] * 20
    assert plan_take(scan(passing), SETTINGS).face_frames == 23


def test_somebody_else_after_the_cut_is_several_people_and_the_same_person_is_not() -> None:
    error = refusal(scan([[face()]] * 20 + [[face(BOB)]] * 18, cuts=[20]))
    assert (error.code, error.numbers) == ("several_people", {"others_frames": 18, "face_frames": 20})
    assert plan_take(scan([[face()]] * 20 + [[face((0.9, 0.1))]] * 18, cuts=[20]), SETTINGS).face_frames == 38


def test_person_of_many_shots_is_who_fills_most_of_all_and_not_who_is_closest_in_one() -> None:
    shots = [[face()]] * 20 + [[face(BOB, side=250)]] * 19 + [[face()]] * 80
    plan = plan_take(scan(shots, cuts=[20, 39, 59, 79, 99]), SETTINGS)
    assert (plan.face_frames, plan.shots) == (100, 6)


def test_person_who_turns_into_another_without_a_cut_ends_the_run() -> None:
    others = [[face(BOB)]] * 3
    plan = plan_take(scan([[face()]] * 18 + others), SETTINGS)
    assert plan.frame_indices[-1] <= 34
    assert plan.face_frames == 18


@pytest.mark.parametrize(
    ("shape", "size", "crop_size"),
    [
        ((1920, 1080), (480, 848), (1908, 1080)),
        ((1080, 1920), (848, 480), (1080, 1908)),
        ((1440, 1080), (480, 640), (1440, 1080)),
        ((1080, 1440), (640, 480), (1080, 1440)),
        ((1000, 1000), (480, 480), (1000, 1000)),
    ],
)
def test_size_is_the_one_that_shows_most_of_the_picture(
    shape: tuple[int, int], size: tuple[int, int], crop_size: tuple[int, int]
) -> None:
    width, height = shape
    plan = plan_take(scan([[face(x=width / 2, y=height / 2)]] * 17, width=width, height=height), SETTINGS)
    left, top, right, bottom = plan.crop
    assert (plan.height, plan.width) == size
    assert (right - left, bottom - top) == crop_size


def test_crop_keeps_the_face_at_the_pictures_edge() -> None:
    square = replace(SETTINGS, sizes=((480, 480),))
    assert plan_take(scan([[face(x=1800)]] * 17), square).crop == (840, 0, 1920, 1080)
    assert plan_take(scan([[face(x=110)]] * 17), square).crop == (0, 0, 1080, 1080)
    assert plan_take(scan([[face(x=800)]] * 17), square).crop == (260, 0, 1340, 1080)


def test_size_that_shows_the_faces_whole_way_is_preferred_to_one_that_shows_more_picture() -> None:
    both = replace(SETTINGS, sizes=((480, 480), (480, 640)))
    crossing = [[face(x=400 + 65 * at, y=600)] for at in range(17)]
    assert plan_take(scan(crossing, width=1600, height=1600), both).width == 480
    assert plan_take(scan(crossing, width=1800, height=1080), both).width == 640


def test_picture_that_would_be_enlarged_too_much_is_too_small() -> None:
    error = refusal(scan([[face(x=160, y=120)]] * 17, width=320, height=240))
    assert error.code == "too_small"
    assert error.numbers == {"width": 320, "height": 240, "enlarged": 2.0}


def test_references_are_spread_over_the_run_and_the_frontal_face_comes_first() -> None:
    frames = [[face()] for _ in range(30)]
    turned = face()
    turned = replace(
        turned, landmarks=turned.landmarks + np.array([[0, 0], [0, 0], [60, 0], [0, 0], [0, 0]], np.float32)
    )
    frames[0] = [turned]
    parts = plan_take(scan(frames), SETTINGS).references
    assert [(part[0].frame_index, len(part)) for part in parts] == [(2, 3), (20, 3), (40, 3)]


def test_settings_for_the_published_model_are_the_five_sizes_and_for_tiny_its_own() -> None:
    published = settings_for(TransformerConfig(), "antelopev2-0123")
    assert (len(published.sizes), published.num_frames, published.same_person) == (5, 49, 0.3)
    tiny = settings_for(tiny_config(), "dlib-0123")
    assert (tiny.sizes, tiny.num_frames, tiny.same_person) == (((96, 96),), 17, 0.535)


def test_settings_survive_json() -> None:
    settings = settings_for(TransformerConfig(), "antelopev2-0123")
    assert FootageSettings.from_record(json.loads(json.dumps(asdict(settings)))) == settings
