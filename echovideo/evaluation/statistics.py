"""Statistics of what judges read against what is true, under R weightings of N clips at once.

Weights (R, N) say how often each clip counts; a bootstrap's resamples are such weightings. Every statistic is made of
weighted sums, so that all resamples cost one matrix product. Arrays are numpy, float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def once(clips: int) -> Numbers:
    """Return the weighting (1, N) in which each clip counts once."""
    return np.ones((1, clips))


def resampled_people(person: NDArray[np.int64], resamples: int, seed: int) -> Numbers:
    """Return the weightings (R, N) of a bootstrap that draws people, each with all of its clips.

    `person` (N,) counts from 0. The same numbers of people and resamples and the same seed draw the same people, so
    that differences between two generators are of the same people.
    """
    count = int(person.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws[:, person].astype(np.float64)


def mean(values: Numbers, weights: Numbers, counted: NDArray[np.bool_] | None = None) -> Numbers:
    """Return the weighted mean (R, ...) of values (N, ...), over the counted entries; NaN where nothing counts."""
    chosen = np.ones(values.shape) if counted is None else counted.astype(np.float64)
    total = _sum(np.where(chosen > 0, values, 0.0), weights)
    count = _sum(chosen, weights)
    return _divide(total, count, count > 0, np.nan)


def determination(estimate: Numbers, truth: Numbers, weights: Numbers) -> Numbers:
    """Return R2 (R, C) of each column of estimates (N, C): 1 is exact, 0 no better than the truth's mean.

    NaN where the truth does not vary.
    """
    # Moments of centred numbers: those of raw ones would lose digits.
    centred = truth - truth.mean(axis=0)
    residual = _sum((estimate - truth) ** 2, weights)
    spread = _sum(centred**2, weights) - _sum(centred, weights) ** 2 / weights.sum(axis=1, keepdims=True)
    unexplained = _divide(residual, spread, spread > 1e-12, np.nan)
    return np.asarray(1 - unexplained, dtype=np.float64)


def correlation(estimate: Numbers, truth: Numbers, weights: Numbers) -> Numbers:
    """Return Pearson's correlation (R,) over all entries of (N, C); 0 where one side does not vary."""
    first, second = estimate - estimate.mean(), truth - truth.mean()
    count = weights.sum(axis=1) * first.shape[1]

    def moment(values: Numbers) -> Numbers:
        return np.asarray(_sum(values.sum(axis=1), weights) / count, dtype=np.float64)

    product = moment(first * second) - moment(first) * moment(second)
    size = np.sqrt(
        np.clip(moment(first**2) - moment(first) ** 2, 0, None)
        * np.clip(moment(second**2) - moment(second) ** 2, 0, None)
    )
    return _divide(product, size, size > 1e-12, 0.0)


def regression(outcome: Numbers, causes: tuple[Numbers, ...], weights: Numbers) -> Numbers:
    """Return the least-squares weight (R, causes) of each cause (N, C) in the outcome (N, C).

    One weight for all columns, and a constant of its own for each column. Entries with a NaN do not count.
    """
    clips, columns = outcome.shape
    counted = np.isfinite(outcome) & np.logical_and.reduce([np.isfinite(cause) for cause in causes])
    constants = np.broadcast_to(np.eye(columns), (clips, columns, columns))
    design = np.concatenate([*(cause[..., None] for cause in causes), constants], axis=2)
    design = np.where(counted[..., None], design, 0.0)
    target = np.where(counted, outcome, 0.0)
    gram = _sum(np.einsum("nci,ncj->nij", design, design), weights)
    moment = _sum(np.einsum("nci,nc->ni", design, target), weights)
    # A column that nothing counts in has a constant of no consequence: any least-squares solution will do.
    solved = np.linalg.pinv(gram, hermitian=True) @ moment[..., None]
    return np.asarray(solved[:, : len(causes), 0], dtype=np.float64)


def ranking_share(score: Numbers, truth: NDArray[np.bool_]) -> float:
    """Return the chance that a random true entry scores above a random false one: the area under the ROC curve.

    Ties count for half. NaN where all are true or none is.
    """
    ranked, position = np.unique(score.ravel(), return_inverse=True)
    counts = np.bincount(position, minlength=len(ranked))
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    chosen = truth.ravel()
    true, false = int(chosen.sum()), int((~chosen).sum())
    if true == 0 or false == 0:
        return float("nan")
    return float((mean_rank[position][chosen].sum() - true * (true + 1) / 2) / (true * false))


def angles(first: Numbers, second: Numbers) -> Numbers:
    """Return the angle in radians between vectors of the last axis, whatever their lengths."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = (first * second).sum(axis=-1) / lengths
    return np.asarray(np.arccos(np.clip(cosine, -1, 1)), dtype=np.float64)


def _divide(above: Numbers, below: Numbers, where: NDArray[np.bool_], otherwise: float) -> Numbers:
    return np.asarray(np.divide(above, below, out=np.full_like(above, otherwise), where=where), dtype=np.float64)


def _sum(values: Numbers, weights: Numbers) -> Numbers:
    """Return the weighted sums (R, ...) of values (N, ...)."""
    total = weights @ values.reshape(len(values), -1)
    return np.asarray(total.reshape(len(weights), *values.shape[1:]), dtype=np.float64)
