"""Statistics of what judges read against what is true, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def determination(estimate: Numbers, truth: Numbers) -> Numbers:
    """Return R2 of each column of estimates (N, C): 1 is exact, 0 no better than the truth's mean.

    A column whose truth does not vary is NaN.
    """
    residual = ((estimate - truth) ** 2).sum(axis=0)
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    shares: Numbers = 1 - residual / np.where(spread > 0, spread, np.nan)
    return shares


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
    total = mean_rank[position][chosen].sum()
    return float((total - true * (true + 1) / 2) / (true * false))


def correlation(first: Numbers, second: Numbers) -> float:
    """Return Pearson's correlation of two columns (N,); 0 where one does not vary."""
    a, b = first - first.mean(), second - second.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else 0.0


def slope(estimate: Numbers, truth: Numbers) -> float:
    """Return the slope of the least-squares line from truth (N,) to estimate (N,)."""
    centred = truth - truth.mean()
    return float((centred * (estimate - estimate.mean())).sum() / (centred * centred).sum())


def regress(outcome: Numbers, *causes: Numbers) -> Numbers:
    """Return the least-squares weight of each cause (N,) in the outcome (N,), with a constant that is left out."""
    design = np.column_stack([*causes, np.ones(len(outcome))])
    return np.asarray(np.linalg.lstsq(design, outcome, rcond=None)[0][:-1], dtype=np.float64)


def angles(first: Numbers, second: Numbers) -> Numbers:
    """Return the angle in radians between vectors of the last axis, whatever their lengths."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = (first * second).sum(axis=-1) / lengths
    return np.asarray(np.arccos(np.clip(cosine, -1, 1)), dtype=np.float64)
