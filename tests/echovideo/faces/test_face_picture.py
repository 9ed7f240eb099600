from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from echovideo.faces.analyzer import FaceAnalyzer
from echovideo.faces.photo import decode_photo
from echovideo.faces.picture import draw_identity


def test_draw_identity_shows_photo_face_and_numbers(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> None:
    photo = decode_photo(photos["hopper"])
    identity = analyzer.analyze(photos["hopper"])
    sheet = np.asarray(draw_identity(photo, identity))
    width = round(512 * 512 / 600)
    assert sheet.shape == (512, width + 512 + 320, 3)
    np.testing.assert_array_equal(sheet[:, width : width + 512], identity.face_image)

    scale = 512 / 600
    x, y = (identity.landmarks[2] * scale).round().astype(int)
    np.testing.assert_array_equal(sheet[y, x], (255, 80, 80))
    left, top, _, bottom = (np.array(identity.box) * scale).astype(int)
    assert (np.abs(sheet[(top + bottom) // 2, left : left + 4].astype(int) - (80, 220, 120)).max(axis=1) == 0).any()
    assert (sheet[:, width + 512 :] > 200).any()
