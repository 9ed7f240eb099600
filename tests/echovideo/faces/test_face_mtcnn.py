from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from echovideo.errors import WeightsError
from echovideo.faces.mtcnn import MtcnnDetector, suppress
from echovideo.faces.photo import decode_photo


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector()


@pytest.mark.parametrize(
    ("name", "box", "points"),
    [
        (
            "collins",
            (180, 64, 265, 173),
            ((204, 101.5), (246.6, 103.3), (225.4, 129.2), (201.6, 139.7), (245.4, 141)),
        ),
        (
            "hopper",
            (170.6, 110.7, 353.9, 330.5),
            ((222.7, 191.8), (308.2, 185.7), (267.7, 238.2), (232.6, 277.3), (305.7, 273.6)),
        ),
    ],
)
def test_detect_of_a_portrait_finds_the_face_and_its_points(
    detector: MtcnnDetector, photos: Mapping[str, bytes], name: str, box: tuple[float], points: tuple[tuple[float]]
) -> None:
    boxes, found = detector.detect(decode_photo(photos[name])[:, :, ::-1])
    assert boxes.shape == (1, 5)
    assert boxes[0, 4] > 0.99
    np.testing.assert_allclose(boxes[0, :4], box, atol=2)
    np.testing.assert_allclose(found[0], points, atol=2)


def test_detect_of_six_people_finds_six_faces(detector: MtcnnDetector, photos: Mapping[str, bytes]) -> None:
    boxes, points = detector.detect(decode_photo(photos["six"])[:, :, ::-1])
    assert len(boxes) == 6
    assert ((points > boxes[:, None, :2]) & (points < boxes[:, None, 2:4])).mean() > 0.95
    np.testing.assert_array_equal(boxes[:, 4], np.sort(boxes[:, 4])[::-1])


def test_detect_of_a_faceless_image_finds_none(detector: MtcnnDetector) -> None:
    for image in (np.zeros((300, 300, 3), dtype=np.uint8), skimage.data.coffee()):
        boxes, points = detector.detect(image)
        assert boxes.shape == (0, 5)
        assert points.shape == (0, 5, 2)


def test_detect_batch_equals_detecting_each_frame(detector: MtcnnDetector) -> None:
    frames = np.stack([skimage.data.astronaut()[offset : offset + 300, 100:400] for offset in (0, 20, 212)])
    batch = detector.detect_batch(frames)
    assert [len(boxes) for boxes, _ in batch] == [1, 1, 0]
    for frame, (boxes, points) in zip(frames, batch, strict=True):
        alone, alone_points = detector.detect(frame[:, :, ::-1])
        np.testing.assert_allclose(boxes, alone, atol=0.05)
        np.testing.assert_allclose(points, alone_points, atol=0.05)


def test_detect_of_a_small_frame_answers_in_its_own_pixels(detector: MtcnnDetector) -> None:
    frame = skimage.data.astronaut()[0:256, 96:352, ::-1]
    _, points = detector.detect(frame)
    _, small = detector.detect(cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA))
    np.testing.assert_allclose(small[0], points[0] * 96 / 256, atol=1)


def test_detect_of_a_face_cut_by_the_border_finds_it(detector: MtcnnDetector) -> None:
    boxes, _ = detector.detect(np.ascontiguousarray(skimage.data.astronaut()[:, 195:, ::-1]))
    assert len(boxes) == 1
    assert boxes[0, 0] < 5


def test_suppress_drops_what_overlaps_and_what_lies_inside() -> None:
    boxes = np.array(
        [[0, 0, 99, 99, 0.8], [5, 5, 104, 104, 0.9], [300, 0, 399, 99, 0.7], [320, 20, 349, 49, 0.6]], dtype=np.float32
    )
    assert suppress(boxes, 0.5).tolist() == [1, 2, 3]
    assert suppress(boxes, 0.5, "smaller").tolist() == [1, 2]
    assert suppress(boxes[:0], 0.5).tolist() == []


def test_detector_without_its_weights_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"mtcnn\.safetensors"):
        MtcnnDetector(weights=tmp_path / "mtcnn.safetensors")
