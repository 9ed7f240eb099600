"""Photos of known people, and both kinds of face pack."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import insightface
import matplotlib
import numpy as np
import onnx
import pytest
import skimage.data
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits
from echovideo.faces.packs import embedded_pack
from echovideo.faces.parsing import BiSeNet
from echovideo.faces.recogniser import export_recogniser

_ASSETS = Path(__file__).parents[2] / "assets" / "faces"
_SCRFD_SIDE = 640
_SCRFD_BOX = (179.0, 60.0, 268.0, 173.0)
_SCRFD_POINTS = ((204.0, 101.5), (246.5, 103.5), (225.5, 129.0), (201.5, 139.5), (245.5, 141.0))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos() -> Mapping[str, bytes]:
    """Eileen Collins (512x512), Grace Hopper (512x600), Obama twice, Biden, and six people in one picture."""
    return {
        "collins": png(skimage.data.astronaut()),
        "hopper": (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes(),
        "obama": (_ASSETS / "obama.jpg").read_bytes(),
        "obama2": (_ASSETS / "obama2.jpg").read_bytes(),
        "biden": (_ASSETS / "biden.jpg").read_bytes(),
        "six": (Path(insightface.__path__[0]) / "data" / "images" / "t1.jpg").read_bytes(),
    }


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `face_encoder` folder of the embedded kind."""
    folder = tmp_path_factory.mktemp("embedded") / "face_encoder"
    export_recogniser(folder / "recogniser.onnx")
    return folder


@pytest.fixture(scope="session")
def analyzer(embedded_folder: Path) -> FaceAnalyzer:
    return FaceAnalyzer(embedded_pack(embedded_folder))


@pytest.fixture(scope="session")
def lenient_analyzer(analyzer: FaceAnalyzer) -> FaceAnalyzer:
    return FaceAnalyzer(analyzer.pack, FaceLimits(min_face_px=0, min_sharpness=0, max_yaw_degrees=180))


@pytest.fixture(scope="session")
def production_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `face_encoder` folder of the published layout with nets of the published shapes and random or fixed weights.

    The detector always reports one face, at Collins's place in a 512x512 photo.
    """
    folder = tmp_path_factory.mktemp("production") / "face_encoder"
    models = folder / "models" / "antelopev2"
    models.mkdir(parents=True)
    onnx.save(_scrfd(), models / "scrfd_10g_bnkps.onnx")
    onnx.save(_glintr100(), models / "glintr100.onnx")
    torch.manual_seed(0)
    torch.save(BiSeNet().state_dict(), folder / "parsing_bisenet.pth")
    return folder


def _scrfd() -> onnx.ModelProto:
    """SCRFD's nine outputs, scores, boxes and points at strides 8, 16, 32, as constants with one face at stride 8."""
    scale, stride = _SCRFD_SIDE / 512, 8
    centre = (28, 14)  # anchor column and row under the face: pixel (224, 112) of 512
    anchor = np.array(centre, dtype=np.float32) * stride
    left, top, right, bottom = np.array(_SCRFD_BOX, dtype=np.float32) * scale
    shapes = {"score": 1, "bbox": 4, "kps": 10}
    constants = {}
    for name, width in shapes.items():
        for level in (8, 16, 32):
            constants[f"{name}_{level}"] = np.zeros(((_SCRFD_SIDE // level) ** 2 * 2, width), dtype=np.float32)
    row = (centre[1] * (_SCRFD_SIDE // stride) + centre[0]) * 2
    constants["score_8"][row] = 0.9
    constants["bbox_8"][row] = (
        np.array([anchor[0] - left, anchor[1] - top, right - anchor[0], bottom - anchor[1]]) / stride
    )
    constants["kps_8"][row] = ((np.array(_SCRFD_POINTS) * scale - anchor) / stride).ravel()
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(a)) for name, a in constants.items()],
        "scrfd",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in constants.items()],
    )
    return _model(graph)


def _glintr100() -> onnx.ModelProto:
    """A recogniser of glintr100's shapes, (batch, 3, 112, 112) to (batch, 512): mean colours, then a random matrix."""
    weight = np.random.default_rng(0).standard_normal((3 * 14 * 14, 512)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["input.1"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
        ],
        "glintr100",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return _model(graph)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
