"""The lightness of a face's skin, measured in the pixels between its five points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2lab

from echovideo.evaluation.statistics import Numbers
from echovideo.faces.analyzer import recognition_crop
from echovideo.faces.mtcnn import MtcnnDetector

# Both cheeks and the bridge of the nose in the 112 pixel crop, clear of eyes, mouth and beard: x, y, half a side.
_PATCHES = ((33, 72, 4), (79, 72, 4), (56, 60, 3))


def skin_colour(frame_HWC: NDArray[np.uint8], points_52: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the RGB (3,) of a face's skin: the median colour of that of three patches which is neither the lightest
    nor the darkest, so that a shadow on one cheek does not count."""
    crop = recognition_crop(frame_HWC, points_52)
    colours = [
        np.median(crop[y - half : y + half + 1, x - half : x + half + 1], axis=(0, 1)).astype(np.uint8)
        for x, y, half in _PATCHES
    ]
    colours.sort(key=lightness)
    middle: NDArray[np.uint8] = colours[len(colours) // 2]
    return middle


def lightness(colour_3: NDArray[np.uint8]) -> float:
    """Return L* of an RGB colour (CIELAB, D65): 0 black to 100 white."""
    return float(rgb2lab(colour_3[None, None])[0, 0, 0])


def clip_lightness(
    clips_BFHWC: NDArray[np.uint8], detector: MtcnnDetector, moments: Sequence[int] = (0, 8, 16)
) -> Numbers:
    """Return each clip's skin lightness (B,), the mean over its frames at `moments`; NaN where none shows a face."""
    found = np.full(len(clips_BFHWC), np.nan)
    for number, clip in enumerate(clips_BFHWC):
        frames = clip[list(moments)]
        seen = [
            lightness(skin_colour(frame, points[0]))
            for frame, (boxes, points) in zip(frames, detector.detect_batch(frames), strict=True)
            if len(boxes)
        ]
        if seen:
            found[number] = float(np.mean(seen))
    return found
