from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from echovideo.evaluation.cases import Case, asked_indices, drawn_cases, reference_scene
from echovideo.evaluation.claims import interval
from echovideo.evaluation.networks import FRAMES, NUISANCES, TRAITS, mole_map, nuisances, traits
from echovideo.evaluation.scores import (
    CHANCE,
    IN_REFERENCE,
    SCORES,
    Evidence,
    asked_nuisances,
    copied_share,
    score,
    share_of_ceiling,
    ssim,
)
from echovideo.evaluation.statistics import Numbers
from echovideo.synthetic.caption import read_caption
from echovideo.synthetic.clip import ATTRIBUTES, scene_curves
from echovideo.synthetic.person import SPLITS, identity_parameters

PEOPLE = 60
CLIPS_EACH = 4
RESAMPLES = 60


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return drawn_cases(clips_each=CLIPS_EACH, seeds=SPLITS["test"][:PEOPLE])


def array(values: torch.Tensor) -> Numbers:
    return values.double().numpy()


@pytest.fixture(scope="module")
def perfect(cases: list[Case]) -> Evidence:
    """A generator that shows what was asked, judged without error."""
    random = np.random.default_rng(0)

    def noise() -> Numbers:
        return 0.02 * random.normal(size=(len(cases), 128))

    identity = identity_parameters(torch.tensor([case.person for case in cases]))
    person = np.repeat(np.arange(PEOPLE), CLIPS_EACH)
    gallery = random.normal(size=(PEOPLE, 128))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    truth = gallery[person] + noise()
    asked = asked_indices(cases).numpy()
    shown = scene_curves([case.condition for case in cases], FRAMES)
    moles = array(mole_map(identity))
    return Evidence(
        person=person,
        gallery=gallery,
        embedding=truth,
        truth_embedding=truth,
        reference_embedding=gallery[person] + noise(),
        traits=array(traits(identity)),
        true_traits=array(traits(identity)),
        visible=np.array([name != "ear_size" for name in TRAITS]),
        read=asked,
        asked=asked,
        referenced=np.array(
            [[values.index(case.reference.attributes()[name]) for name, values in ATTRIBUTES.items()] for case in cases]
        ),
        nuisances=array(nuisances(shown)),
        asked_nuisances=asked_nuisances(cases),
        referenced_nuisances=array(nuisances(reference_scene(cases))),
        nuisance_scale=array(nuisances(shown).std(dim=0)),
        moles=moles,
        true_moles=moles,
        ssim_to_reference=np.full(len(cases), 0.3),
        flicker=np.full(len(cases), 2.0),
        accepted=np.ones(len(cases)),
    )


def test_score_perfect_generator_reaches_every_bound(perfect: Evidence) -> None:
    scores = score(perfect, resamples=RESAMPLES)
    assert set(scores) == set(SCORES)
    for name in ("rank_1", "identity_r2", "attributes", "text_wins", "freckles", "moles", "skin_tone_slope"):
        assert scores[name].value == pytest.approx(1), name
    assert scores["m_cp"].value == pytest.approx(-1)
    assert scores["skin_tone_error_dark"].value == pytest.approx(0)
    # The prompt does not say the exact angle, so following it exactly leaves noise around 1.
    assert scores["text_follow_index"].value == pytest.approx(1, abs=0.1)
    assert abs(scores["copy_paste_index"].value) < 0.05


def test_score_generator_that_returns_the_reference_is_found_copying(perfect: Evidence) -> None:
    copier = replace(
        perfect,
        embedding=perfect.reference_embedding,
        read=perfect.referenced,
        nuisances=perfect.referenced_nuisances,
    )
    scores = score(copier, resamples=RESAMPLES)
    assert scores["copy_paste_index"].value == pytest.approx(1)
    assert scores["text_follow_index"].value == pytest.approx(0, abs=1e-6)
    assert all(scores[f"copied: {name}"].value == pytest.approx(1) for name in NUISANCES)
    assert scores["m_cp"].value == pytest.approx(1)
    assert scores["text_wins"].value == 0
    assert scores["reference_wins"].value == 1
    assert scores["rank_1"].value == 1
    chance = np.mean([1 / len(ATTRIBUTES[name]) for name in IN_REFERENCE])
    assert np.mean([scores[f"right: {name}"].value for name in IN_REFERENCE]) == pytest.approx(chance, abs=0.06)


def test_score_half_copied_pose_is_measured_as_half(perfect: Evidence) -> None:
    mixed = 0.5 * perfect.asked_nuisances + 0.25 * perfect.referenced_nuisances
    scores = score(replace(perfect, nuisances=mixed), resamples=RESAMPLES)
    assert scores["text_follow_index"].value == pytest.approx(0.5)
    assert scores["copy_paste_index"].value == pytest.approx(0.25)


def test_score_other_peoples_faces_are_at_chance(perfect: Evidence) -> None:
    other = np.random.default_rng(1).permutation(len(perfect.person))
    shuffled = replace(
        perfect, embedding=perfect.embedding[other], traits=perfect.traits[other], moles=perfect.moles[other]
    )
    scores = score(shuffled, resamples=RESAMPLES)
    assert scores["rank_1"].value < 5 / PEOPLE
    assert scores["identity_r2"].value == pytest.approx(-1, abs=0.3)
    for name in ("freckles", "moles", "skin_tone_slope"):
        assert abs(scores[name].value) < 0.2, name
    assert scores["attributes"].value == 1


def test_score_random_attributes_are_at_chance(perfect: Evidence) -> None:
    random = np.random.default_rng(2)
    guesses = np.stack([random.integers(len(values), size=len(perfect.person)) for values in ATTRIBUTES.values()], 1)
    scores = score(replace(perfect, read=guesses), resamples=RESAMPLES)
    assert scores["attributes"].value == pytest.approx(CHANCE["attributes"], abs=0.03)


def test_score_attribute_that_was_not_asked_does_not_count(perfect: Evidence) -> None:
    asked, read = perfect.asked.copy(), perfect.read.copy()
    asked[::2] = -1
    read[::2] = 0
    asked[:, 0] = -1
    scores = score(replace(perfect, asked=asked, read=read), resamples=RESAMPLES)
    assert scores["attributes"].value == 1
    assert np.isnan(scores["right: pose"].value)


def test_score_same_people_are_drawn_for_every_generator_so_differences_are_paired(perfect: Evidence) -> None:
    worse = replace(perfect, ssim_to_reference=perfect.ssim_to_reference + perfect.person / 100)
    alike = replace(worse, ssim_to_reference=worse.ssim_to_reference + 0.001)
    first, second = (score(seen, resamples=RESAMPLES)["ssim_to_reference"] for seen in (worse, alike))
    assert np.ptp(first.interval()) > 0.05
    np.testing.assert_allclose(interval(second.resampled - first.resampled), 0.001)


def test_share_of_ceiling_is_the_ratio_and_none_for_scores_that_have_no_share(perfect: Evidence) -> None:
    poor = replace(perfect, read=np.where(np.arange(len(perfect.read))[:, None] % 2, perfect.read, -2))
    scores = score(poor, ceiling=perfect, resamples=RESAMPLES)
    assert share_of_ceiling("attributes", scores["attributes"]) == pytest.approx(0.5)
    assert share_of_ceiling("copy_paste_index", scores["copy_paste_index"]) is None


def test_copied_share_half_way_from_truth_to_reference_is_zero() -> None:
    truth, reference = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert copied_share(truth + reference, truth, reference)[0] == pytest.approx(0)
    assert copied_share(truth, truth, truth)[0] == 0


def test_asked_nuisances_left_open_by_the_prompt_are_nan(cases: list[Case]) -> None:
    partial = replace(cases[0], asked={"light": cases[0].condition.light, "pose": cases[0].condition.pose})
    known = np.isfinite(asked_nuisances([partial])[0])
    assert dict(zip(NUISANCES, known.tolist(), strict=True)) == {
        "yaw": False,
        "pitch": True,
        "light_x": True,
        "smile": False,
        "mouth_open": False,
    }


def test_ssim_equals_scikit_images() -> None:
    random = np.random.default_rng(3)
    first = random.integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)
    second = np.clip(first.astype(int) + random.integers(-40, 40, first.shape), 0, 255).astype(np.uint8)
    expected = [structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ssim(torch.from_numpy(first), torch.from_numpy(second)).numpy(), expected, atol=1e-9)


def test_drawn_cases_prompt_says_all_that_is_asked_and_references_are_independent(cases: list[Case]) -> None:
    assert all(read_caption(case.prompt) == dict(case.asked) == case.condition.attributes() for case in cases)
    same: Callable[[str], float] = lambda name: float(  # noqa: E731
        np.mean([case.asked[name] == case.reference.attributes()[name] for case in cases])
    )
    for name, values in ATTRIBUTES.items():
        assert same(name) == pytest.approx(1 / len(values), abs=0.12), name
