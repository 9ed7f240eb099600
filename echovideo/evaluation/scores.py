"""Scores of generated clips: who is in them, what happens, and what of the reference photo was copied.

`expect` prepares what clips of the cases are compared with. `look` has the judges read clips into an Evidence of plain
arrays; `score` turns Evidence into every score with its 95 %
interval over people. The ceiling of a score is the same score of drawn clips that show what was asked, after the
autoencoder that every generated clip goes through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from echovideo.evaluation.cases import Case, asked_indices, reference_scene
from echovideo.evaluation.claims import Measured
from echovideo.evaluation.networks import FRAMES, NUISANCES, TRAITS, Judges, mole_map, nuisances, traits
from echovideo.evaluation.statistics import (
    Numbers,
    angles,
    correlation,
    determination,
    mean,
    once,
    regression,
    resampled_people,
)
from echovideo.synthetic.clip import ATTRIBUTES, scene_curves
from echovideo.synthetic.person import identity_parameters

RESAMPLES = 1000
IN_REFERENCE = ("pose", "expression", "light", "light_colour", "hair_style", "hair_colour", "glasses")
"""The attributes that the reference's face and hair show, so that a prompt can contradict them."""
_NAMES = tuple(ATTRIBUTES)
_DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "yaw": ("pose", "motion"),
    "pitch": ("pose",),
    "light_x": ("light",),
    "smile": ("expression",),
    "mouth_open": ("expression", "motion"),
}
_TONES = ("light", "medium", "dark")
_MELANIN, _FRECKLES = TRAITS.index("melanin"), TRAITS.index("freckles")
_SSIM_WINDOW, _SSIM_C1, _SSIM_C2 = 7, 0.01**2, 0.03**2
_LEAST_ANGLE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a score means, which way is better, its unit, and whether a share of its ceiling says anything."""

    meaning: str
    better: Literal["high", "low", "near one"]
    unit: str = "share"
    share: bool = False


SCORES: Mapping[str, Score] = {
    "rank_1": Score(meaning="the person is the nearest of the gallery", better="high", share=True),
    "identity_r2": Score(
        meaning="R2 of the identity parameters that the judge sees, mean", unit="R2", better="high", share=True
    ),
    "attributes": Score(meaning="what the prompt asks for is seen, mean over attributes", better="high", share=True),
    "copy_paste_index": Score(
        meaning="how far yaw, pitch, light and expression follow the reference photo", unit="slope", better="low"
    ),
    "text_follow_index": Score(
        meaning="how far yaw, pitch, light and expression follow the prompt",
        unit="slope",
        better="near one",
        share=True,
    ),
    "m_cp": Score(
        meaning="nearer to the reference photo than to the truth, by angle", unit="share of the angle", better="low"
    ),
    "text_wins": Score(
        meaning="the prompt's value is seen where it contradicts the reference", better="high", share=True
    ),
    "reference_wins": Score(meaning="the reference's value is seen where the prompt contradicts it", better="low"),
    "detail": Score(
        meaning="freckles and moles as they are: mean of the next two", unit="correlation", better="high", share=True
    ),
    "freckles": Score(
        meaning="correlation with the true amount of freckles", unit="correlation", better="high", share=True
    ),
    "moles": Score(meaning="correlation with the true map of moles", unit="correlation", better="high", share=True),
    "skin_tone_slope": Score(
        meaning="slope of the skin tone on the true one", unit="slope", better="near one", share=True
    ),
    **{
        f"skin_tone_error_{tone}": Score(meaning=f"mean error of the skin tone, {tone} skin", unit="of 1", better="low")
        for tone in _TONES
    },
    "ssim_to_reference": Score(meaning="SSIM of the first frame to the reference photo", unit="SSIM", better="low"),
    "flicker": Score(meaning="mean change from frame to frame, of 255", unit="of 255", better="low"),
    "accepted": Score(meaning="accepted by the face recogniser at 1 % false accepts", better="high", share=True),
    **{f"right: {name}": Score(meaning=f"the asked {name} is seen", better="high", share=True) for name in ATTRIBUTES},
    **{
        f"copied: {name}": Score(meaning=f"how far {name} follows the reference photo", better="low")
        for name in NUISANCES
    },
}
"""Every score, in the order of tables. What a prompt leaves out does not count."""
CHANCE: Mapping[str, float] = {
    "attributes": float(np.mean([1 / len(values) for values in ATTRIBUTES.values()])),
    **{f"right: {name}": 1 / len(values) for name, values in ATTRIBUTES.items()},
}
"""What guessing would reach. For `rank_1` it is one over the gallery."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evidence:
    """What was seen in N clips of P people, and what is true of them.

    `person` (N,) int64, the row of each clip's person in `gallery` (P, E). `embedding`, `truth_embedding` and
    `reference_embedding` (N, E): of the clip, of a drawn clip that shows what was asked, of the reference photo.
    `traits`, `true_traits` (N, T); `visible` bool (T,). `read`, `asked`, `referenced` int64 (N, attributes): indices
    into ATTRIBUTES seen in the clip, asked by the prompt (-1: nothing) and shown in the reference.
    `nuisances`, `asked_nuisances` (NaN where the prompt leaves them open), `referenced_nuisances` (N, nuisances) and
    `nuisance_scale` (nuisances,). `moles`, `true_moles` (N, cells). `ssim_to_reference`, `flicker` (N,). `accepted`
    (N,), 1 where the recogniser accepts the clip, or None where it was not asked.
    """

    person: NDArray[np.int64]
    gallery: Numbers
    embedding: Numbers
    truth_embedding: Numbers
    reference_embedding: Numbers
    traits: Numbers
    true_traits: Numbers
    visible: NDArray[np.bool_]
    read: NDArray[np.int64]
    asked: NDArray[np.int64]
    referenced: NDArray[np.int64]
    nuisances: Numbers
    asked_nuisances: Numbers
    referenced_nuisances: Numbers
    nuisance_scale: Numbers
    moles: Numbers
    true_moles: Numbers
    ssim_to_reference: Numbers
    flicker: Numbers
    accepted: Numbers | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Expected:
    """What clips of N cases of P people are compared with, whichever generator made them.

    `references_BHWC` uint8, the photo of each case. `gallery` (P, E), `truth_embedding`, `reference_embedding` (N, E)
    as in Evidence.
    """

    cases: Sequence[Case]
    references_BHWC: Tensor  # noqa: N815
    gallery: Numbers
    truth_embedding: Numbers
    reference_embedding: Numbers


def expect(
    judges: Judges, cases: Sequence[Case], *, truths_BFHWC: Tensor, references_BFHWC: Tensor, gallery_BFHWC: Tensor
) -> Expected:
    """Return what clips of the cases are compared with, from pictures as echovideo.evaluation.cases draws them.

    uint8 (B, frames, 96, 96, 3); the gallery's people are in the order in which the cases first name them.
    """
    assert len(truths_BFHWC) == len(references_BFHWC) == len(cases)
    assert len(gallery_BFHWC) == len(_order(cases))
    return Expected(
        cases=cases,
        references_BHWC=references_BFHWC[:, 0],
        gallery=_array(judges.read(gallery_BFHWC).embeddings),
        truth_embedding=_array(judges.read(truths_BFHWC).embeddings),
        reference_embedding=_array(judges.read(references_BFHWC).embeddings),
    )


def look(judges: Judges, clips_BFHWC: Tensor, expected: Expected, accepted: Numbers | None = None) -> Evidence:
    """Return what the judges see in generated clips, uint8 (B, FRAMES, 96, 96, 3), one a case."""
    cases = expected.cases
    assert len(clips_BFHWC) == len(cases)
    order = _order(cases)
    reading = judges.read(clips_BFHWC)
    identity = identity_parameters(torch.tensor([case.person for case in cases]))
    return Evidence(
        person=np.array([order.index(case.person) for case in cases], dtype=np.int64),
        gallery=expected.gallery,
        embedding=_array(reading.embeddings),
        truth_embedding=expected.truth_embedding,
        reference_embedding=expected.reference_embedding,
        traits=_array(reading.traits),
        true_traits=_array(traits(identity)),
        visible=_array(judges.identity.visible) > 0,
        read=torch.stack([reading.attributes[name] for name in _NAMES], dim=1).numpy(),
        asked=asked_indices(cases).numpy(),
        referenced=np.array(
            [[ATTRIBUTES[name].index(case.reference.attributes()[name]) for name in _NAMES] for case in cases]
        ),
        nuisances=_array(reading.nuisances),
        asked_nuisances=asked_nuisances(cases),
        referenced_nuisances=_array(nuisances(reference_scene(cases))),
        nuisance_scale=_array(judges.attribute.nuisance_scale),
        moles=_array(reading.moles),
        true_moles=_array(mole_map(identity)),
        ssim_to_reference=_array(ssim(clips_BFHWC[:, 0], expected.references_BHWC)),
        flicker=_array((clips_BFHWC[:, 1:].float() - clips_BFHWC[:, :-1].float()).abs().mean(dim=(1, 2, 3, 4))),
        accepted=accepted,
    )


def asked_nuisances(cases: Sequence[Case]) -> Numbers:
    """Return the nuisances (B, len(NUISANCES)) that the prompts imply: means over what they leave to chance.

    NaN where the prompt says nothing of the attributes that decide one.
    """
    implied = _array(nuisances(scene_curves([case.condition for case in cases], FRAMES, reference=True)))
    said = np.array(
        [[all(name in case.asked for name in _DECIDED_BY[nuisance]) for nuisance in NUISANCES] for case in cases]
    )
    return np.asarray(np.where(said, implied, np.nan), dtype=np.float64)


def score(evidence: Evidence, ceiling: Evidence | None = None, *, resamples: int = RESAMPLES) -> dict[str, Measured]:
    """Return every score that the evidence has, resampled over people, with its ceiling.

    Scores of two generators of the same cases are paired: their resamples draw the same people.
    """
    weights = resampled_people(evidence.person, resamples, seed=0)
    values, resampled = _scores(evidence, once(len(evidence.person))), _scores(evidence, weights)
    ceilings = {} if ceiling is None else _scores(ceiling, once(len(ceiling.person)))
    return {
        name: Measured(
            value=float(values[name][0]),
            resampled=resampled[name],
            ceiling=float(ceilings[name][0]) if name in ceilings else None,
        )
        for name in SCORES
        if name in values
    }


def share_of_ceiling(name: str, measured: Measured) -> float | None:
    """Return the score over its ceiling, None for scores where that says nothing."""
    if not SCORES[name].share or measured.ceiling is None or measured.ceiling <= 0:
        return None
    return measured.value / measured.ceiling


def found_first(embedding: Numbers, gallery: Numbers, person: NDArray[np.int64]) -> Numbers:
    """Return 1 for each clip (N,) whose own person is the nearest of the gallery by cosine, else 0."""
    found: Numbers = (np.argmax(embedding @ gallery.T, axis=1) == person).astype(np.float64)
    return found


def copied_share(embedding: Numbers, truth: Numbers, reference: Numbers) -> Numbers:
    """Return M_CP (N,) of WithAnyone (arXiv 2510.14975, equation 2), by the angles between embeddings (N, E).

    (angle to the truth - angle to the reference) / angle between truth and reference: 1 is the reference again, -1 the
    truth.
    """
    apart = np.maximum(angles(truth, reference), _LEAST_ANGLE)
    return np.asarray((angles(embedding, truth) - angles(embedding, reference)) / apart, dtype=np.float64)


def ssim(first_BHWC: Tensor, second_BHWC: Tensor) -> Tensor:
    """Return the structural similarity (B,) of uint8 pictures (Wang et al. 2004): 7 x 7 windows, mean over colours."""
    first, second = (pictures.permute(0, 3, 1, 2).double() / 255 for pictures in (first_BHWC, second_BHWC))

    def local(pictures: Tensor) -> Tensor:
        return functional.avg_pool2d(pictures, _SSIM_WINDOW, stride=1)

    # Sample covariances, as scikit-image has them.
    unbiased = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    mean_1, mean_2 = local(first), local(second)
    variance_1 = unbiased * (local(first * first) - mean_1**2)
    variance_2 = unbiased * (local(second * second) - mean_2**2)
    covariance = unbiased * (local(first * second) - mean_1 * mean_2)
    similar = (2 * mean_1 * mean_2 + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    return (similar / ((mean_1**2 + mean_2**2 + _SSIM_C1) * (variance_1 + variance_2 + _SSIM_C2))).mean(dim=(1, 2, 3))


def _scores(seen: Evidence, weights: Numbers) -> dict[str, Numbers]:
    """Return each score (R,) under weightings (R, N)."""
    right = seen.read == seen.asked
    asked = seen.asked >= 0
    each_right = mean(right.astype(np.float64), weights, asked)
    shown = [_NAMES.index(name) for name in IN_REFERENCE]
    contradicted = (asked & (seen.asked != seen.referenced))[:, shown]
    text_wins = mean(right[:, shown].astype(np.float64), weights, contradicted)
    reference_wins = mean((seen.read == seen.referenced)[:, shown].astype(np.float64), weights, contradicted)

    scale = seen.nuisance_scale
    generated, asked_for, referenced = (
        values / scale for values in (seen.nuisances, seen.asked_nuisances, seen.referenced_nuisances)
    )
    follow = regression(generated, (asked_for, referenced), weights)
    copied = {
        f"copied: {name}": regression(generated[:, [i]], (asked_for[:, [i]], referenced[:, [i]]), weights)[:, 1]
        for i, name in enumerate(NUISANCES)
    }
    freckles = correlation(seen.traits[:, [_FRECKLES]], seen.true_traits[:, [_FRECKLES]], weights)
    moles = correlation(seen.moles, seen.true_moles, weights)
    tone, true_tone = seen.traits[:, _MELANIN], seen.true_traits[:, _MELANIN]
    third = np.minimum((true_tone * len(_TONES)).astype(np.int64), len(_TONES) - 1)
    visible = determination(seen.traits[:, seen.visible], seen.true_traits[:, seen.visible], weights)
    return {
        "rank_1": mean(found_first(seen.embedding, seen.gallery, seen.person), weights),
        "identity_r2": visible.mean(axis=1),
        "attributes": _mean_of(each_right),
        "copy_paste_index": follow[:, 1],
        "text_follow_index": follow[:, 0],
        "m_cp": mean(copied_share(seen.embedding, seen.truth_embedding, seen.reference_embedding), weights),
        "text_wins": _mean_of(text_wins),
        "reference_wins": _mean_of(reference_wins),
        "detail": (freckles + moles) / 2,
        "freckles": freckles,
        "moles": moles,
        "skin_tone_slope": regression(tone[:, None], (true_tone[:, None],), weights)[:, 0],
        **{
            f"skin_tone_error_{name}": mean(np.abs(tone - true_tone), weights, third == i)
            for i, name in enumerate(_TONES)
        },
        "ssim_to_reference": mean(seen.ssim_to_reference, weights),
        "flicker": mean(seen.flicker, weights),
        **({} if seen.accepted is None else {"accepted": mean(seen.accepted, weights)}),
        **{f"right: {name}": each_right[:, i] for i, name in enumerate(_NAMES)},
        **copied,
    }


def _mean_of(shares: Numbers) -> Numbers:
    """Return the mean (R,) over attributes (R, A), of those that were asked for at all."""
    counted = np.isfinite(shares)
    return np.asarray(np.where(counted, shares, 0.0).sum(axis=1) / np.maximum(counted.sum(axis=1), 1))


def _order(cases: Sequence[Case]) -> list[int]:
    """Return the people of the cases, each once."""
    return list(dict.fromkeys(case.person for case in cases))


def _array(values: Tensor) -> Numbers:
    array: Numbers = values.detach().cpu().double().numpy()
    return array
