"""Drawn people as arrays and files of footage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echovideo.synthetic.check import as_bytes
from echovideo.synthetic.clip import ClipCondition
from echovideo.synthetic.draw import draw
from echovideo.synthetic.person import SPLITS, people
from echovideo.video import encode_mp4

FRAMES = 24
_ANN, _BOB = people([SPLITS["train"][0], SPLITS["train"][2]])
_CLIPS = {
    "ann-1": (_ANN, ClipCondition(seed=1, motion="talk", background="wall")),
    "ann-2": (_ANN, ClipCondition(seed=2, motion="talk", background="park", garment_colour="red")),
    "bob-1": (_BOB, ClipCondition(seed=3, motion="turn_left", background="beach", garment_colour="blue")),
}


@dataclass(frozen=True)
class Drawn:
    """`frames` uint8 (F, 96, 96, 3); `face` float32 (F, 96, 96), the true share of face and hair."""

    frames: NDArray[np.uint8]
    face: NDArray[np.float32]


@cache
def drawn_clips(frames: int) -> Mapping[str, Drawn]:
    """Return ann-1, ann-2 and bob-1, every second frame the one before again."""
    drawing = draw([person for person, _ in _CLIPS.values()], [clip for _, clip in _CLIPS.values()], frames=frames // 2)
    face = (drawing.face_BFHW + drawing.hair_BFHW).clamp(0, 1).numpy()
    return {
        name: Drawn(as_bytes(drawing.frames_BFCHW[number]).repeat(2, axis=0), face[number].repeat(2, axis=0))
        for number, name in enumerate(_CLIPS)
    }


def write(frames: NDArray[np.uint8], path: Path, fps: int = 16) -> Path:
    """Write frames as an MP4 and return its path."""
    encode_mp4(frames, path, fps=fps, metadata={})
    return path
