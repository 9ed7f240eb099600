"""Drawn people as footage: two clips of one person and one of another, 24 frames of 96 px each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits
from echovideo.faces.packs import open_pack
from echovideo.footage.plan import FootageSettings
from tests.echovideo.footage.drawn import FRAMES, drawn_clips

SETTINGS = FootageSettings(sizes=((96, 96),), num_frames=17, min_face_px=24.0, same_person=0.535)


@pytest.fixture(scope="session")
def clips() -> Mapping[str, NDArray[np.uint8]]:
    """ann-1, ann-2 and bob-1, uint8 (24, 96, 96, 3)."""
    return {name: drawing.frames for name, drawing in drawn_clips(FRAMES).items()}


@pytest.fixture(scope="session")
def settings() -> FootageSettings:
    return SETTINGS


@pytest.fixture(scope="session")
def analyzer(tiny_folder: Path) -> FaceAnalyzer:
    return FaceAnalyzer(open_pack(tiny_folder / "face_encoder"), FaceLimits(min_face_px=24.0))
