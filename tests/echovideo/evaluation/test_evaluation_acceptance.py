from __future__ import annotations

import numpy as np
import pytest

from echovideo.evaluation.acceptance import accepted, clip_embeddings, threshold
from echovideo.evaluation.cases import draw_gallery, draw_reference_photos, drawn_cases
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import load_recogniser
from echovideo.synthetic.person import SPLITS


def test_threshold_one_percent_of_strangers_pass_and_faceless_clips_never() -> None:
    random = np.random.default_rng(0)
    gallery = random.normal(size=(200, 16)) + 3
    person = np.repeat(np.arange(200), 3)
    world_mean = gallery.mean(axis=0)
    drawn = gallery[person] + 0.2 * random.normal(size=(600, 16))
    drawn[0] = np.nan
    least = threshold(drawn, person, gallery, world_mean)

    own = accepted(drawn, person, gallery, world_mean, least)
    assert own[0] == 0
    assert own[1:].mean() > 0.95
    strangers = [accepted(drawn, (person + shift) % 200, gallery, world_mean, least)[1:] for shift in range(1, 200)]
    assert np.mean(strangers) == pytest.approx(0.01, abs=5e-4)


def test_clip_embeddings_drawn_person_is_nearest_to_its_own_picture_and_a_blank_clip_has_none() -> None:
    cases = drawn_cases(seeds=SPLITS["test"][:3])
    clips = draw_reference_photos(cases).numpy()
    detector, recogniser = MtcnnDetector(), load_recogniser()
    embeddings = clip_embeddings(np.concatenate((clips, np.zeros_like(clips[:1]))), detector, recogniser, (0,))
    assert np.isnan(embeddings[3]).all()
    gallery = clip_embeddings(draw_gallery(SPLITS["test"][:3]).numpy(), detector, recogniser, (0,))
    distance = np.linalg.norm(embeddings[:3, None] - gallery[None], axis=2)
    np.testing.assert_array_equal(distance.argmin(axis=1), [0, 1, 2])
