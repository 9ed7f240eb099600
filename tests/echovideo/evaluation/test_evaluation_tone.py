from __future__ import annotations

import numpy as np
import pytest

from echovideo.evaluation.cases import draw_gallery
from echovideo.evaluation.tone import clip_lightness, lightness, skin_colour
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.templates import RECOGNITION_POINTS
from echovideo.synthetic.person import PARAMETERS, SPLITS, people

POINTS = np.array(RECOGNITION_POINTS, dtype=np.float32)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [((0, 0, 0), 0.0), ((255, 255, 255), 100.0), ((119, 119, 119), 50.03), ((200, 150, 120), 66.10)],
)
def test_lightness_is_that_of_cielab(colour: tuple[int, int, int], expected: float) -> None:
    assert lightness(np.array(colour, dtype=np.uint8)) == pytest.approx(expected, abs=0.05)


def test_skin_colour_with_one_cheek_in_shadow_is_that_of_the_rest() -> None:
    frame = np.full((112, 112, 3), (200, 150, 120), dtype=np.uint8)
    frame[:, :45] //= 3
    # Eyes and mouth are no skin.
    for x, y in RECOGNITION_POINTS[:2] + RECOGNITION_POINTS[3:]:
        frame[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = 0
    np.testing.assert_allclose(skin_colour(frame, POINTS), (200, 150, 120), atol=1)


def test_clip_lightness_of_drawn_people_follows_their_melanin_and_a_blank_clip_has_none() -> None:
    seeds = SPLITS["test"][:60]
    melanin = [person.parameters[PARAMETERS.index("melanin")] for person in people(seeds)]
    order = np.argsort(melanin)
    chosen = [seeds[number] for start in (0, 28, 56) for number in order[start : start + 4]]
    clips = np.concatenate((draw_gallery(chosen).numpy(), np.zeros((1, 1, 96, 96, 3), dtype=np.uint8)))
    *found, blank = clip_lightness(clips, MtcnnDetector(), (0,))
    assert np.isnan(blank)
    light, middle, dark = np.nanmean(np.reshape(found, (3, 4)), axis=1)
    assert light - middle > 8
    assert middle - dark > 8
