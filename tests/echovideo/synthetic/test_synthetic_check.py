from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import load_recogniser
from echovideo.synthetic.check import Sightings, contact_sheet, look_at, verification_auc
from echovideo.synthetic.person import SPLITS, people


@pytest.fixture(scope="module")
def sightings() -> Sightings:
    return look_at(people(SPLITS["validation"][:12]), MtcnnDetector(), load_recogniser())


def test_face_nets_find_drawn_people_with_their_points(sightings: Sightings) -> None:
    assert len(sightings.seen) == 72
    assert sightings.seen.mean() >= 0.95


def test_recogniser_tells_drawn_people_apart_across_clips(sightings: Sightings) -> None:
    mean = sightings.embeddings[sightings.found].mean(axis=0)
    assert verification_auc(sightings, mean) > 0.93


def test_conditions_move_an_embedding_less_than_another_person_does(sightings: Sightings) -> None:
    by_clip = sightings.embeddings.reshape(12, 2, 3, -1).mean(axis=2)
    same = np.linalg.norm(by_clip[:, 0] - by_clip[:, 1], axis=1)
    other = np.linalg.norm(by_clip[:, 0] - np.roll(by_clip[:, 1], 1, axis=0), axis=1)
    assert same.mean() < 0.75 * other.mean()


def test_verification_of_shuffled_people_is_chance(sightings: Sightings) -> None:
    shuffled = dataclasses.replace(
        sightings, embeddings=np.random.default_rng(0).standard_normal(sightings.embeddings.shape).astype(np.float32)
    )
    assert abs(verification_auc(shuffled, np.zeros(128, dtype=np.float32)) - 0.5) < 0.08


def test_contact_sheet_has_a_row_a_person() -> None:
    sheet = contact_sheet(people(SPLITS["validation"][:2]), side=32, columns=3)
    assert sheet.size == (96, 64)
    assert len(set(sheet.convert("L").get_flattened_data())) > 60
