from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from insightface.model_zoo.arcface_onnx import ArcFaceONNX

from echovideo.errors import WeightsError
from echovideo.faces.analyzer import recognition_crop
from echovideo.faces.recogniser import DlibFaceRecogniser, load_recogniser

_COLLINS = np.array([[204, 101.5], [246.6, 103.3], [225.4, 129.2], [201.6, 139.7], [245.4, 141]], dtype=np.float32)


@pytest.fixture(scope="module")
def recogniser() -> DlibFaceRecogniser:
    return load_recogniser()


def _normalised(crop: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(crop).permute(2, 0, 1).float() - 127.5) / 127.5


def test_recogniser_on_a_chip_equals_dlib(recogniser: DlibFaceRecogniser) -> None:
    chip = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    embedding = recogniser.embed(torch.from_numpy(chip).permute(2, 0, 1)[None].float())[0].numpy()
    # dlib 20.0.1's compute_face_descriptor of the same chip.
    dlib_says = [-0.0921897, 0.08416894, 0.04315767, -0.0117392, -0.15688255, -0.06620562]
    np.testing.assert_allclose(embedding[:6], dlib_says, atol=1e-6)
    assert np.linalg.norm(embedding) == pytest.approx(1.280806897850697, abs=1e-5)


def test_recogniser_onnx_equals_torch(recogniser: DlibFaceRecogniser, embedded_folder: Path) -> None:
    crops = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    session = onnxruntime.InferenceSession(embedded_folder / "recogniser.onnx", providers=["CPUExecutionProvider"])
    for batch in (crops, crops[:1]):
        (exported,) = session.run(None, {"crops": batch.numpy()})
        np.testing.assert_allclose(exported, recogniser(batch).numpy(), atol=1e-4)


def test_recogniser_through_insightface_equals_torch(recogniser: DlibFaceRecogniser, embedded_folder: Path) -> None:
    crop = recognition_crop(skimage.data.astronaut(), _COLLINS)
    arcface = ArcFaceONNX(str(embedded_folder / "recogniser.onnx"))
    expected = recogniser(_normalised(crop)[None])[0].numpy()
    np.testing.assert_allclose(arcface.get_feat(crop[:, :, ::-1])[0], expected, atol=1e-4)


def test_recogniser_pulls_a_crop_towards_another_face_by_its_gradient(recogniser: DlibFaceRecogniser) -> None:
    target = recogniser(_normalised(recognition_crop(skimage.data.astronaut(), _COLLINS))[None])
    crop = torch.zeros(1, 3, 112, 112, requires_grad=True)
    optimizer = torch.optim.Adam([crop], lr=0.1)
    distances = []
    for _ in range(6):
        distance = (recogniser(crop) - target).norm()
        distances.append(distance.item())
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    assert distances[-1] < 0.7 * distances[0]
    assert all(parameter.grad is None for parameter in recogniser.parameters())


def test_load_recogniser_of_a_damaged_file_names_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "damaged.dat"
    path.write_bytes(b"not dlib's")
    with pytest.raises(WeightsError, match=r"damaged\.dat.*expected 55533b28"):
        load_recogniser(path)


def test_load_recogniser_without_the_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.dat"):
        load_recogniser(tmp_path / "absent.dat")
