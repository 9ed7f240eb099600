"""What is to be seen in a file of footage: its faces and how much each frame differs from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from echovideo.errors import EchoVideoError
from echovideo.faces.analyzer import MAX_DETECTION_SIDE, FaceAnalyzer, FrameFace
from echovideo.video import StreamedFrame, VideoError, frame_rate, stream_frames

_CHUNK = 16
_HISTOGRAM_SIDE = 64
_HISTOGRAM_BINS = (8, 4, 4)


class FootageError(EchoVideoError):
    """Nothing can be trained on in a clip's footage.

    Codes: `unreadable`, `no_face`, `too_short`, `several_people`, `too_small` and `no_reference`.
    """

    code = "footage"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """One frame that was looked at: its number in the file, its faces in the file's pixels, largest first.

    `difference` from the frame looked at before: 0 the same colours in the same quarters, 1 none in common.
    """

    frame_index: int
    difference: float
    faces: tuple[FrameFace, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """All that was seen in a file: its size in pixels, the sightings, the nets' name `pack`."""

    width: int
    height: int
    pack: str
    sightings: tuple[Sighting, ...]


def scan_footage(path: Path, analyzer: FaceAnalyzer, fps: float) -> Scan:
    """Look at a file at about `fps` frames a second, whatever its own rate is: at every n-th frame, n whole.

    Frames are streamed, so footage may be of any length. Raises FootageError `unreadable`.
    """
    try:
        stride = max(1, round(frame_rate(path) / fps))
        sightings: list[Sighting] = []
        chunk: list[StreamedFrame] = []
        before: NDArray[np.float32] | None = None
        width = height = 0
        for frame in stream_frames(path, stride=stride, max_side=MAX_DETECTION_SIDE):
            height, width = (round(side / frame.scale) for side in frame.pixels_HWC.shape[:2])
            chunk.append(frame)
            if len(chunk) == _CHUNK:
                before = _look(chunk, before, analyzer, sightings)
                chunk = []
        if chunk:
            _look(chunk, before, analyzer, sightings)
    except VideoError as error:
        raise FootageError(f"{error.message}; copy or export it again", code="unreadable") from error
    if not sightings:
        raise FootageError(f"cannot read the video {path}: no frame could be decoded", code="unreadable")
    return Scan(width=width, height=height, pack=analyzer.pack.name, sightings=tuple(sightings))


def frame_difference(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Return how much two `colour_histogram`s differ, 0 to 1: half their L1 distance, the mean over the quarters."""
    return float(np.abs(before - after).sum(axis=1).mean() / 2)


def colour_histogram(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the hue, saturation, value histogram of each quarter of an RGB frame: (4, 8 * 4 * 4), each sums to 1.

    Quarters, so that two shots of the same colours in other places differ too.
    """
    small = cv2.resize(frame, (_HISTOGRAM_SIDE, _HISTOGRAM_SIDE), interpolation=cv2.INTER_AREA)
    hsv = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)
    half = _HISTOGRAM_SIDE // 2
    quarters = [hsv[top : top + half, left : left + half] for top in (0, half) for left in (0, half)]
    histograms = [
        cv2.calcHist([quarter], [0, 1, 2], None, _HISTOGRAM_BINS, [0, 180, 0, 256, 0, 256]).ravel()
        for quarter in quarters
    ]
    return np.asarray(np.stack(histograms) / half**2, dtype=np.float32)


def _look(
    chunk: Sequence[StreamedFrame],
    before: NDArray[np.float32] | None,
    analyzer: FaceAnalyzer,
    sightings: list[Sighting],
) -> NDArray[np.float32]:
    """Append each frame's sighting and return the last one's histogram."""
    for frame, faces in zip(chunk, analyzer.find_faces(np.stack([f.pixels_HWC for f in chunk])), strict=True):
        histogram = colour_histogram(frame.pixels_HWC)
        sightings.append(
            Sighting(
                frame_index=frame.index,
                difference=0.0 if before is None else frame_difference(before, histogram),
                faces=tuple(scaled(face, 1 / frame.scale) for face in faces),
            )
        )
        before = histogram
    assert before is not None
    return before


def scaled(face: FrameFace, scale: float) -> FrameFace:
    """Return the face in the pixels of the same frame at `scale` times the size."""
    left, top, right, bottom = (side * scale for side in face.box)
    return replace(face, box=(left, top, right, bottom), landmarks=face.landmarks * np.float32(scale))
