from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from echovideo.faces import analyzer
from echovideo.faces.templates import ALIGNED_POINTS, FACE_SIDE
from echovideo.synthetic.draw import Drawing
from echovideo.tiny.faces import face_image, recognition_crop, warp


def pixels(photos: Drawing) -> np.ndarray:
    return (photos.frames_BFCHW[:, 0].permute(0, 2, 3, 1) * 255).round().byte().numpy()


def opencv_points(photos: Drawing) -> np.ndarray:
    """OpenCV's pixel centres lie at whole numbers."""
    return photos.landmarks_BF52[:, 0].numpy() - 0.5


def as_bytes(pictures_NCHW: torch.Tensor) -> np.ndarray:
    return (pictures_NCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


def test_warp_exact_similarity_gives_opencvs_pixels(photos: Drawing) -> None:
    picture = pixels(photos)[0]
    turned = cv2.getRotationMatrix2D((60, 55), 20, 0.7) + np.array([[0, 0, 4], [0, 0, -6]])
    points = np.array([[40, 50], [80, 52], [61, 70], [45, 90], [78, 91]], dtype=np.float32)
    template = points @ turned[:, :2].T + turned[:, 2]
    expected = cv2.warpAffine(picture, turned, (100, 100))
    warped = warp(
        torch.from_numpy(picture).permute(2, 0, 1)[None] / 255,
        torch.from_numpy(points)[None] + 0.5,
        torch.from_numpy(template).float() + 0.5,
        100,
        100,
    )
    # OpenCV places samples in steps of 1/32 pixel; at the border it mixes in black a little differently.
    assert apart(as_bytes(warped)[0], expected) < 1


def test_recognition_crop_drawn_faces_is_insightfaces(photos: Drawing) -> None:
    crops = recognition_crop(photos, photos.landmarks_BF52.flatten(0, 1))
    for crop, picture, points in zip(as_bytes((crops + 1) / 2), pixels(photos), opencv_points(photos), strict=True):
        assert apart(crop, analyzer.recognition_crop(picture, points)) < 2


def test_face_image_points_that_fit_is_the_analyzers_face_with_drawn_face_and_hair_as_mask(photos: Drawing) -> None:
    # Points that the similarity fits exactly: where they do not, OpenCV's LMedS takes a part of them.
    matrix = cv2.getRotationMatrix2D((64, 60), -8, 0.16)
    template = np.array(ALIGNED_POINTS, dtype=np.float32)
    points = ((template - 256) @ matrix[:, :2].T + (64, 60)).astype(np.float32)
    faces = face_image(photos, torch.from_numpy(points)[None].expand(4, -1, -1) + 0.5, 96)
    shown = (photos.face_BFHW + photos.hair_BFHW).clamp(max=1)[:, 0].numpy()
    for face, picture, mask in zip(as_bytes(faces), pixels(photos), shown, strict=True):
        masked = (picture * mask[:, :, None]).round().astype(np.uint8)
        aligned = cv2.warpAffine(masked, analyzer.alignment(points), (FACE_SIDE, FACE_SIDE))
        expected = cv2.resize(aligned, (96, 96), interpolation=cv2.INTER_AREA)
        assert apart(face, expected) < 1.5
        assert expected.mean() > 20


@pytest.mark.parametrize("side", [32, 96])
def test_face_image_outside_face_and_hair_is_black(photos: Drawing, side: int) -> None:
    faces = face_image(photos, photos.landmarks_BF52.flatten(0, 1), side)
    assert faces.shape == (4, 3, side, side)
    assert faces[:, :, 0, 0].max() < 0.9
    nothing = Drawing(
        frames_BFCHW=photos.frames_BFCHW,
        face_BFHW=torch.zeros_like(photos.face_BFHW),
        hair_BFHW=torch.zeros_like(photos.hair_BFHW),
        landmarks_BF52=photos.landmarks_BF52,
    )
    assert face_image(nothing, photos.landmarks_BF52.flatten(0, 1), side).max() == 0
