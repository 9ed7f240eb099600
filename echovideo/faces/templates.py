"""Where the five points of an aligned face lie: eyes, nose tip, mouth corners, the picture's left first."""

from __future__ import annotations

FACE_SIDE = 512
"""Height and width of the aligned face, pixels."""
RECOGNITION_SIDE = 112
"""Height and width of the recogniser's crop, pixels."""

# The ArcFace template of 96 x 112 pixels.
_POINTS = (
    (30.2946, 51.6963),
    (65.5318, 51.5014),
    (48.0252, 71.7366),
    (33.5493, 92.3655),
    (62.7299, 92.2041),
)
ALIGNED_POINTS = tuple((x * FACE_SIDE / 96, y * FACE_SIDE / 112) for x, y in _POINTS)
"""In the aligned face: each axis stretched to 512 pixels, as published."""
RECOGNITION_POINTS = tuple((x + 8, y) for x, y in _POINTS)
"""In the recogniser's crop: insightface moves them to the middle of 112 pixels."""
