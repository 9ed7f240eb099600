"""Whether the real face recogniser, the one that conditions the generator, accepts clips as the person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from echovideo.evaluation.statistics import Numbers
from echovideo.faces.analyzer import recognition_crop
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import DlibFaceRecogniser

FALSE_ACCEPTS = 0.01


@torch.inference_mode()
def clip_embeddings(
    clips_BFHWC: NDArray[np.uint8],
    detector: MtcnnDetector,
    recogniser: DlibFaceRecogniser,
    moments: Sequence[int] = (0, 8, 16),
) -> Numbers:
    """Return each clip's embedding (B, 128), the mean over the faces of its frames at `moments`.

    NaN where no frame shows a face.
    """
    embeddings = np.full((len(clips_BFHWC), 128), np.nan)
    for number, clip in enumerate(clips_BFHWC):
        frames = clip[list(moments)]
        crops = [
            torch.from_numpy(recognition_crop(frame, points[0])).permute(2, 0, 1)
            for frame, (boxes, points) in zip(frames, detector.detect_batch(frames), strict=True)
            if len(boxes)
        ]
        if crops:
            embeddings[number] = recogniser((torch.stack(crops).float() - 127.5) / 127.5).double().mean(dim=0).numpy()
    return embeddings


def threshold(drawn: Numbers, person: NDArray[np.int64], gallery: Numbers, world_mean: Numbers) -> float:
    """Return the likeness that FALSE_ACCEPTS of the pairs of a drawn clip (N, E) and another person's picture reach.

    `person` (N,) is the row of each clip's person in `gallery` (P, E). Likeness is the cosine of embeddings less the
    world's mean (E,), by which the recogniser tells drawn people apart. Clips without a face, NaN, do not count.
    """
    seen = np.isfinite(drawn).all(axis=1)
    likeness = _likeness(drawn[seen], gallery, world_mean)
    others = likeness[np.arange(len(gallery))[None] != person[seen][:, None]]
    return float(np.quantile(others, 1 - FALSE_ACCEPTS))


def accepted(
    embeddings: Numbers, person: NDArray[np.int64], gallery: Numbers, world_mean: Numbers, least: float
) -> Numbers:
    """Return for each clip (N, E) 1 if it is more than `least` like its person's picture in `gallery` (P, E), else 0.

    A clip without a face, NaN, is not accepted.
    """
    seen = np.asarray(np.isfinite(embeddings).all(axis=1))
    likeness = _likeness(np.where(seen[:, None], embeddings, 0.0), gallery, world_mean)
    own: Numbers = likeness[np.arange(len(person)), person]
    return np.asarray(seen & (own > least), dtype=np.float64)


def _likeness(embeddings: Numbers, gallery: Numbers, world_mean: Numbers) -> Numbers:
    first, second = embeddings - world_mean, gallery - world_mean
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return np.asarray(first @ second.T, dtype=np.float64)
