from __future__ import annotations

import numpy as np
import pytest

from echovideo.evaluation.statistics import (
    angles,
    correlation,
    determination,
    mean,
    once,
    ranking_share,
    regression,
    resampled_people,
)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_mean_nothing_counted_is_nan_and_the_rest_is_numpys(random: np.random.Generator) -> None:
    values, counted = random.normal(size=(20, 2)), random.random((20, 2)) < 0.5
    counted[:, 1] = False
    result = mean(values, once(20), counted)
    assert result[0, 0] == pytest.approx(values[counted[:, 0], 0].mean())
    assert np.isnan(result[0, 1])


def test_determination_known_noise_is_its_share_of_the_variance(random: np.random.Generator) -> None:
    truth = random.normal(size=(50_000, 1)) + 100
    estimate = truth + 0.5 * random.normal(size=truth.shape)
    assert determination(truth, truth, once(len(truth)))[0, 0] == 1
    assert determination(estimate, truth, once(len(truth)))[0, 0] == pytest.approx(0.75, abs=0.01)
    assert determination(np.full_like(truth, 100), truth, once(len(truth)))[0, 0] == pytest.approx(0, abs=1e-3)


def test_weighting_twice_equals_the_clip_repeated(random: np.random.Generator) -> None:
    truth, weights = random.normal(size=(12, 3)), random.integers(0, 4, size=(1, 12)).astype(float)
    estimate = truth + random.normal(size=truth.shape)
    repeated = np.repeat(np.arange(12), weights[0].astype(int))
    again = once(len(repeated))
    for statistic in (determination, correlation, lambda a, b, w: regression(a, (b,), w)):
        expected = statistic(estimate[repeated], truth[repeated], again)
        np.testing.assert_allclose(statistic(estimate, truth, weights), expected)


def test_correlation_equals_numpys(random: np.random.Generator) -> None:
    first, second = random.normal(size=(40, 3)), random.normal(size=(40, 3))
    expected = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    assert correlation(first, second, once(40))[0] == pytest.approx(expected)
    assert correlation(np.ones((40, 3)), second, once(40))[0] == 0


def test_regression_two_correlated_causes_gives_each_its_own_weight(random: np.random.Generator) -> None:
    text = random.normal(size=(300, 2))
    reference = 0.6 * text + random.normal(size=text.shape)
    outcome = 0.7 * text + 0.2 * reference + np.array([3.0, -1.0])
    np.testing.assert_allclose(regression(outcome, (text, reference), once(300))[0], [0.7, 0.2], atol=1e-9)


def test_regression_entry_without_a_cause_does_not_count(random: np.random.Generator) -> None:
    cause = random.normal(size=(50, 2))
    outcome = 2 * cause
    outcome[:10, 0] = 99
    cause[:10, 0] = np.nan
    assert regression(outcome, (cause,), once(50))[0, 0] == pytest.approx(2)


def test_ranking_share_is_the_share_of_ordered_pairs() -> None:
    score, truth = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert ranking_share(score, truth) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_angles_any_length_is_the_angle_between_directions() -> None:
    first, second = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 5.0], [0.0, 1.0]])
    np.testing.assert_allclose(angles(first, second), [np.pi / 2, 0], atol=1e-7)


def test_resampled_people_all_clips_of_a_person_count_alike_and_draws_repeat() -> None:
    person = np.array([0, 0, 1, 2, 2, 2])
    weights = resampled_people(person, 50, seed=1)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, [0, 2, 3]].sum(axis=1), 3)
    np.testing.assert_array_equal(weights, resampled_people(person, 50, seed=1))
