"""What the ablation is expected to show, written down before it runs, and whether its scores bear it out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Arm = Literal[
    "full",
    "stage_one_only",
    "always_on",
    "without_iitf",
    "in_clip",
    "always_on_in_clip",
    "single_stage",
    "exposure_matched",
]

PEOPLE = 300
"""How many test people are shown; the chance of finding one of them is 1 / PEOPLE."""
CHANCE = 1 / PEOPLE
DIAL = (0.0, 0.5, 1.0)
"""Strengths of the face latent at which an arm is sampled: left out, half of its guidance, as trained."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A score of one arm's clips, made with the face latent at `face_latent` of DIAL."""

    arm: Arm
    score: str
    face_latent: float = 1.0

    def __str__(self) -> str:
        return f"{self.score} of {self.arm} at face latent {self.face_latent:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AtLeast:
    """The score is `bound` or more; `of_ceiling`: this share of the score's ceiling or more."""

    reading: Reading
    bound: float
    of_ceiling: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AtChance:
    """The score's interval reaches down to `chance`: it is not shown to be above it."""

    reading: Reading
    chance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Above:
    """The interval of `higher` minus `lower`, over the same people, lies above zero.

    `or_equal` asks only that the value of `higher` is not below that of `lower`.
    """

    higher: Reading
    lower: Reading
    or_equal: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rises:
    """The score does not fall along DIAL, and the interval of its last minus its first setting lies above zero."""

    arm: Arm
    score: str


Rule = AtLeast | AtChance | Above | Rises


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One expectation. It holds in a training seed if every rule does.

    `reported` is shown beside it and decides nothing.
    """

    name: str
    statement: str
    rules: tuple[Rule, ...]
    reported: tuple[Reading, ...] = ()


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="P1",
        statement="The fusion carries identity: without the face latent the person is still found, and not so when "
        "the fusion was never trained.",
        rules=(
            AtLeast(reading=Reading(arm="full", score="rank_1", face_latent=0.0), bound=30 * CHANCE),
            AtLeast(
                reading=Reading(arm="full", score="identity_r2", face_latent=0.0),
                bound=0.4,
                of_ceiling=True,
            ),
            AtChance(reading=Reading(arm="without_iitf", score="rank_1", face_latent=0.0), chance=CHANCE),
        ),
    ),
    Claim(
        name="P2",
        statement="The paper's order: without the fusion less identity is kept, the face latent given to both.",
        rules=(
            Above(higher=Reading(arm="full", score="rank_1"), lower=Reading(arm="without_iitf", score="rank_1")),
            Above(
                higher=Reading(arm="full", score="identity_r2"),
                lower=Reading(arm="without_iitf", score="identity_r2"),
            ),
        ),
        reported=(Reading(arm="full", score="attributes"), Reading(arm="without_iitf", score="attributes")),
    ),
    Claim(
        name="P3",
        statement="A face latent that is always there is copied more than one dropped at random, where references "
        "are cut from the clip itself.",
        rules=(
            Above(
                higher=Reading(arm="always_on_in_clip", score="copy_paste_index"),
                lower=Reading(arm="in_clip", score="copy_paste_index"),
            ),
        ),
        # References from other clips leave nothing to copy in either arm, so no direction is claimed between them.
        reported=(
            Reading(arm="always_on", score="copy_paste_index"),
            Reading(arm="full", score="copy_paste_index"),
            Reading(arm="always_on_in_clip", score="m_cp"),
            Reading(arm="in_clip", score="m_cp"),
            Reading(arm="single_stage", score="copy_paste_index"),
            Reading(arm="exposure_matched", score="copy_paste_index"),
        ),
    ),
    Claim(
        name="P4",
        statement="The face latent adds detail: freckles and moles are truer with it than without, and than after "
        "stage one alone.",
        rules=(
            Above(
                higher=Reading(arm="full", score="detail"),
                lower=Reading(arm="full", score="detail", face_latent=0.0),
            ),
            Above(
                higher=Reading(arm="full", score="detail"),
                lower=Reading(arm="stage_one_only", score="detail", face_latent=0.0),
            ),
        ),
    ),
    Claim(
        name="P5",
        statement="Where the prompt contradicts the reference, the prompt wins no less often than with the face "
        "latent always on, and more often than with references cut from the clip itself.",
        rules=(
            Above(
                higher=Reading(arm="full", score="text_wins"),
                lower=Reading(arm="always_on", score="text_wins"),
                or_equal=True,
            ),
            Above(higher=Reading(arm="full", score="text_wins"), lower=Reading(arm="in_clip", score="text_wins")),
        ),
        reported=(
            Reading(arm="full", score="reference_wins"),
            Reading(arm="always_on", score="reference_wins"),
            Reading(arm="in_clip", score="reference_wins"),
            Reading(arm="always_on_in_clip", score="reference_wins"),
        ),
    ),
    Claim(
        name="P6",
        statement="Dropping the face latent makes its strength a dial: copying and detail rise along it, and with "
        "the face latent always on there is no such setting as off.",
        rules=(
            Rises(arm="in_clip", score="copy_paste_index"),
            Rises(arm="full", score="detail"),
            Above(
                higher=Reading(arm="full", score="rank_1", face_latent=0.0),
                lower=Reading(arm="always_on", score="rank_1", face_latent=0.0),
            ),
        ),
        reported=(
            Reading(arm="full", score="copy_paste_index", face_latent=0.0),
            Reading(arm="full", score="copy_paste_index", face_latent=0.5),
            Reading(arm="full", score="copy_paste_index"),
        ),
    ),
)
"""The claims, in the order of the method's argument. P1, P2 or P4 failing points to a fault in the code; P3, P5 or P6
failing is a result like any other."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """One score of one arm: its value, its ceiling where it has one, and its value in R resamples of the people.

    `resampled` is float64 (R,). The same resample number is the same people in every arm, so that differences of two
    arms' resamples are paired.
    """

    value: float
    resampled: NDArray[np.float64]
    ceiling: float | None = None

    def interval(self) -> tuple[float, float]:
        """Return the ends of the middle CONFIDENCE of the resamples."""
        return interval(self.resampled)


Measurements = Mapping[Reading, Measured]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the scores say of one rule: whether it holds and the numbers it was decided on."""

    holds: bool
    numbers: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A claim, whether all its rules hold, a finding for each rule, and what is only reported."""

    claim: Claim
    findings: tuple[Finding, ...]
    reported: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the claim holds."""
        return all(finding.holds for finding in self.findings)


def interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of resampled values (R,), at CONFIDENCE."""
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def judge_claim(claim: Claim, measurements: Measurements) -> Verdict:
    """Return whether one training seed's measurements bear out the claim.

    Raises KeyError naming the reading that was not measured.
    """
    return Verdict(
        claim=claim,
        findings=tuple(_judge_rule(rule, measurements) for rule in claim.rules),
        reported=tuple(f"{reading}: {_shown(measurements[reading])}" for reading in claim.reported),
    )


def readings(claims: Sequence[Claim] = CLAIMS) -> set[Reading]:
    """Return every reading that the claims' rules and reports need."""
    needed: set[Reading] = set()
    for claim in claims:
        needed.update(claim.reported)
        for rule in claim.rules:
            match rule:
                case AtLeast() | AtChance():
                    needed.add(rule.reading)
                case Above():
                    needed.update((rule.higher, rule.lower))
                case Rises():
                    needed.update(_along_dial(rule))
    return needed


def _along_dial(rule: Rises) -> list[Reading]:
    return [Reading(arm=rule.arm, score=rule.score, face_latent=setting) for setting in DIAL]


def _judge_rule(rule: Rule, measurements: Measurements) -> Finding:
    match rule:
        case AtLeast():
            measured = measurements[rule.reading]
            bound = rule.bound
            if rule.of_ceiling:
                assert measured.ceiling is not None, f"{rule.reading} has no ceiling"
                bound *= measured.ceiling
            return Finding(
                holds=measured.value >= bound,
                numbers=f"{rule.reading}: {_shown(measured)}, at least {bound:.3f}",
            )
        case AtChance():
            measured = measurements[rule.reading]
            return Finding(
                holds=measured.interval()[0] <= rule.chance,
                numbers=f"{rule.reading}: {_shown(measured)}, chance {rule.chance:.3f}",
            )
        case Above():
            higher, lower = measurements[rule.higher], measurements[rule.lower]
            low, high = interval(higher.resampled - lower.resampled)
            return Finding(
                holds=higher.value >= lower.value if rule.or_equal else low > 0,
                numbers=f"{rule.higher} minus {rule.lower}: "
                f"{higher.value - lower.value:+.3f} [{low:+.3f}, {high:+.3f}]",
            )
        case Rises():
            steps = [measurements[reading] for reading in _along_dial(rule)]
            low, high = interval(steps[-1].resampled - steps[0].resampled)
            rising = all(after.value >= before.value for before, after in itertools.pairwise(steps))
            values = ", ".join(f"{step.value:.3f} at {setting:g}" for step, setting in zip(steps, DIAL, strict=True))
            return Finding(
                holds=rising and low > 0,
                numbers=f"{rule.score} of {rule.arm} along the face latent: {values}; "
                f"last minus first [{low:+.3f}, {high:+.3f}]",
            )


def _shown(measured: Measured) -> str:
    low, high = measured.interval()
    ceiling = "" if measured.ceiling is None else f", ceiling {measured.ceiling:.3f}"
    return f"{measured.value:.3f} [{low:.3f}, {high:.3f}]{ceiling}"
