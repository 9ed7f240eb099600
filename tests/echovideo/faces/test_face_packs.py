from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.scrfd import SCRFD

from echovideo.errors import WeightsError
from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits, compare, recognition_crop
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.packs import open_pack
from echovideo.faces.parsing import BiSeNetParser, MeshParser
from echovideo.faces.photo import decode_photo


def test_open_pack_of_an_embedded_folder_loads_the_small_nets(embedded_folder: Path) -> None:
    pack = open_pack(embedded_folder)
    assert isinstance(pack.detector, MtcnnDetector)
    assert isinstance(pack.parser, MeshParser)
    assert pack.recogniser.output_shape[-1] == 128
    assert pack.name.startswith("dlib-")
    assert pack.name == open_pack(embedded_folder).name


def test_open_pack_of_a_published_folder_loads_insightface_and_bisenet(production_folder: Path) -> None:
    pack = open_pack(production_folder)
    assert isinstance(pack.detector, SCRFD)
    assert isinstance(pack.recogniser, ArcFaceONNX)
    assert isinstance(pack.parser, BiSeNetParser)
    assert pack.recogniser.session.get_providers()[-1] == "CPUExecutionProvider"
    assert pack.recogniser.output_shape[-1] == 512
    assert pack.name.startswith("antelopev2-")


def test_analyzer_with_published_nets_takes_their_face_and_raw_embedding(
    production_folder: Path, photos: Mapping[str, bytes]
) -> None:
    pack = open_pack(production_folder)
    analyzer = FaceAnalyzer(pack, FaceLimits(max_yaw_degrees=90))
    identity = analyzer.analyze(photos["collins"])
    photo = decode_photo(photos["collins"])
    assert identity.quality.detection_score == pytest.approx(0.9)
    np.testing.assert_allclose(identity.box, (179, 60, 268, 173), atol=0.01)
    np.testing.assert_allclose(identity.landmarks[2], (225.5, 129), atol=0.01)

    crop = recognition_crop(photo, identity.landmarks)
    blob = (crop.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
    (expected,) = pack.recogniser.session.run(None, {"input.1": blob})
    assert identity.embedding.shape == (512,)
    assert np.linalg.norm(identity.embedding) > 2
    np.testing.assert_allclose(identity.embedding, expected[0], rtol=1e-3, atol=1e-3)

    score = compare(identity, analyzer.analyze_frames(np.stack([photo, photo])))
    assert score.similarity == pytest.approx(1, abs=1e-5)
    assert score.detection_rate == 1


def test_open_pack_without_the_parser_names_it(production_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(production_folder, tmp_path / "face_encoder")
    (tmp_path / "face_encoder" / "parsing_bisenet.pth").unlink()
    with pytest.raises(WeightsError, match=r"parsing_bisenet\.pth"):
        open_pack(tmp_path / "face_encoder")


def test_open_pack_without_the_recogniser_names_it(production_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(production_folder, tmp_path / "face_encoder")
    (tmp_path / "face_encoder" / "models" / "antelopev2" / "glintr100.onnx").unlink()
    with pytest.raises(WeightsError, match=r"glintr100\.onnx"):
        open_pack(tmp_path / "face_encoder")


def test_open_pack_of_an_empty_folder_names_both_kinds(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"antelopev2.*recogniser\.onnx"):
        open_pack(tmp_path)


def test_pack_name_changes_with_the_weights(production_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(production_folder, tmp_path / "face_encoder")
    parser = tmp_path / "face_encoder" / "parsing_bisenet.pth"
    before = open_pack(tmp_path / "face_encoder").name
    state = torch.load(parser, weights_only=True)
    state["conv_out.conv_out.weight"] += 1
    torch.save(state, parser)
    assert open_pack(tmp_path / "face_encoder").name != before
