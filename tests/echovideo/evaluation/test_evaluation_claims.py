from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from echovideo.evaluation import cases
from echovideo.evaluation.claims import (
    CHANCE,
    CLAIMS,
    DIAL,
    PEOPLE,
    Above,
    AtChance,
    AtLeast,
    Claim,
    Measured,
    Reading,
    Rises,
    Rule,
    judge_claim,
    readings,
)
from echovideo.evaluation.scores import SCORES

FULL, OTHER = Reading(arm="full", score="rank_1"), Reading(arm="always_on", score="rank_1")


def measured(value: float, spread: float = 0.05, ceiling: float | None = None, seed: int = 0) -> Measured:
    noise = spread * np.random.default_rng(seed).normal(size=500)
    return Measured(value=value, resampled=value + noise, ceiling=ceiling)


def holds(rule: Rule, measurements: Mapping[Reading, Measured]) -> bool:
    return judge_claim(Claim(name="P", statement="", rules=(rule,)), measurements).holds


def test_claims_are_six_and_read_scores_that_exist() -> None:
    assert [claim.name for claim in CLAIMS] == ["P1", "P2", "P3", "P4", "P5", "P6"]
    assert {reading.score for reading in readings()} <= set(SCORES)
    assert {reading.face_latent for reading in readings()} <= set(DIAL)
    assert len(cases.PEOPLE) == PEOPLE


def test_at_least_share_of_ceiling_is_of_the_measured_ceiling() -> None:
    rule = AtLeast(reading=FULL, bound=0.4, of_ceiling=True)
    assert holds(rule, {FULL: measured(0.33, ceiling=0.8)})
    assert not holds(rule, {FULL: measured(0.31, ceiling=0.8)})


def test_at_chance_holds_while_the_interval_reaches_chance() -> None:
    rule = AtChance(reading=FULL, chance=CHANCE)
    assert holds(rule, {FULL: measured(0.01, spread=0.005)})
    assert not holds(rule, {FULL: measured(0.1, spread=0.005)})


def test_above_is_decided_on_the_same_people_not_on_each_interval_alone() -> None:
    rule = Above(higher=FULL, lower=OTHER)
    same_people = {FULL: measured(0.52, seed=1), OTHER: measured(0.50, seed=1)}
    other_people = {FULL: measured(0.52, seed=1), OTHER: measured(0.50, seed=2)}
    assert holds(rule, same_people)
    assert not holds(rule, other_people)


@pytest.mark.parametrize(("value", "expected"), [(0.5, True), (0.49, False)])
def test_above_or_equal_compares_the_values(value: float, expected: bool) -> None:
    rule = Above(higher=FULL, lower=OTHER, or_equal=True)
    assert holds(rule, {FULL: measured(value), OTHER: measured(0.5)}) is expected


@pytest.mark.parametrize(("values", "expected"), [((0, 0.3, 0.6), True), ((0, 0.7, 0.6), False), ((0, 0, 0), False)])
def test_rises_needs_every_step_and_a_certain_difference(values: tuple[float, ...], expected: bool) -> None:
    along = {
        Reading(arm="full", score="detail", face_latent=setting): measured(value, seed=number)
        for number, (setting, value) in enumerate(zip(DIAL, values, strict=True))
    }
    assert holds(Rises(arm="full", score="detail"), along) is expected


def test_claim_fails_with_one_rule_and_says_which() -> None:
    claim = Claim(
        name="P",
        statement="",
        rules=(AtLeast(reading=FULL, bound=0.1), AtLeast(reading=FULL, bound=0.9)),
        reported=(OTHER,),
    )
    verdict = judge_claim(claim, {FULL: measured(0.5), OTHER: measured(0.2)})
    assert not verdict.holds
    assert [finding.holds for finding in verdict.findings] == [True, False]
    assert "at least 0.900" in verdict.findings[1].numbers
    assert verdict.reported[0].startswith("rank_1 of always_on at face latent 1: 0.200 [")


def test_judge_claim_unmeasured_reading_is_named() -> None:
    with pytest.raises(KeyError, match="always_on"):
        judge_claim(CLAIMS[2], {})
