from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from echovideo.errors import WeightsError
from echovideo.faces.analyzer import FaceAnalyzer, align_face
from echovideo.faces.parsing import REMOVED_LABELS, BiSeNet, BiSeNetParser, MeshParser, load_bisenet
from echovideo.faces.photo import decode_photo


@pytest.fixture(scope="module")
def aligned(analyzer: FaceAnalyzer, photos: Mapping[str, bytes]) -> Mapping[str, np.ndarray]:
    faces = {}
    for name in ("collins", "hopper", "obama", "obama2", "biden"):
        photo = decode_photo(photos[name])
        _, points = analyzer.pack.detector.detect(photo[:, :, ::-1])
        faces[name] = align_face(photo, points[0])
    return faces


# Places in the aligned face, (x, y), found by looking at it.
@pytest.mark.parametrize(
    ("name", "kept", "removed"),
    [
        ("collins", {"fringe": (256, 40), "hair at the side": (30, 150)}, {"suit": (20, 490), "neck": (440, 500)}),
        ("hopper", {"glasses": (150, 235), "forehead": (256, 160)}, {"background": (490, 250), "coat": (20, 480)}),
        ("obama", {"hair": (256, 25), "chin": (256, 480)}, {"left ear": (30, 290), "wall": (20, 60)}),
        ("obama2", {"hair": (400, 60), "cheek": (400, 330)}, {"flag": (60, 100), "background": (40, 400)}),
        ("biden", {"forehead": (256, 100), "hair": (440, 100)}, {"curtain": (490, 300), "wall": (15, 380)}),
    ],
)
def test_mesh_mask_keeps_face_and_hair_and_removes_the_rest(
    aligned: Mapping[str, np.ndarray],
    name: str,
    kept: Mapping[str, tuple[int, int]],
    removed: Mapping[str, tuple[int, int]],
) -> None:
    mask = MeshParser().mask(aligned[name])
    assert mask.shape == (512, 512)
    assert 0.5 < mask.mean() < 0.85
    assert mask[180:400, 180:330].all()
    assert {place for place, (x, y) in kept.items() if not mask[y, x]} == set()
    assert {place for place, (x, y) in removed.items() if mask[y, x]} == set()


def test_mesh_mask_is_the_same_each_time(aligned: Mapping[str, np.ndarray]) -> None:
    parser = MeshParser()
    first = parser.mask(aligned["collins"])
    parser.mask(aligned["obama"])
    np.testing.assert_array_equal(parser.mask(aligned["collins"]), first)
    np.testing.assert_array_equal(MeshParser().mask(aligned["collins"]), first)


def test_mesh_mask_of_a_blank_face_does_not_fail() -> None:
    assert MeshParser().mask(np.zeros((512, 512, 3), dtype=np.uint8)).shape == (512, 512)


def _bisenet_that_says(label: int) -> BiSeNet:
    """BiSeNet whose last layer gives `label` everywhere: its inputs are positive, all other rows zero."""
    net = BiSeNet()
    with torch.no_grad():
        net.conv_out.conv.bn.bias.fill_(1)
        net.conv_out.conv_out.weight.zero_()
        net.conv_out.conv_out.weight[label] = 1
    return net


@pytest.mark.parametrize(("label", "kept"), [(1, True), (6, True), (17, True), (8, False), (14, False), (18, False)])
def test_bisenet_mask_keeps_the_published_labels(
    aligned: Mapping[str, np.ndarray], tmp_path: Path, label: int, kept: bool
) -> None:
    save_file(_bisenet_that_says(label).state_dict(), tmp_path / "parsing.safetensors")
    parser = BiSeNetParser(tmp_path / "parsing.safetensors")
    assert (parser.labels(aligned["collins"]) == label).all()
    assert (parser.mask(aligned["collins"]) == kept).all()


def test_bisenet_removes_exactly_what_was_published() -> None:
    assert sorted(REMOVED_LABELS) == [0, 7, 8, 9, 14, 15, 16, 18]


def test_bisenet_of_the_published_file_format_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BiSeNet().eval()
    torch.save(net.state_dict(), tmp_path / "parsing_bisenet.pth")
    image = torch.randn(1, 3, 512, 512)
    with torch.inference_mode():
        logits = load_bisenet(tmp_path / "parsing_bisenet.pth")(image)
        assert logits.shape == (1, 19, 512, 512)
        torch.testing.assert_close(logits, net(image), rtol=0, atol=0)


def test_bisenet_has_facexlib_parameter_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in BiSeNet().state_dict().items()}
    assert len(shapes) == 191
    expected = {
        "cp.resnet.conv1.weight": (64, 3, 7, 7),
        "cp.resnet.layer1.0.conv1.weight": (64, 64, 3, 3),
        "cp.resnet.layer4.0.downsample.0.weight": (512, 256, 1, 1),
        "cp.arm16.conv.conv.weight": (128, 256, 3, 3),
        "cp.arm32.bn_atten.running_var": (128,),
        "cp.conv_head16.bn.weight": (128,),
        "cp.conv_avg.conv.weight": (128, 512, 1, 1),
        "ffm.convblk.conv.weight": (256, 256, 1, 1),
        "ffm.conv1.weight": (64, 256, 1, 1),
        "conv_out.conv_out.weight": (19, 256, 1, 1),
        "conv_out16.conv.conv.weight": (64, 128, 3, 3),
        "conv_out32.conv_out.weight": (19, 64, 1, 1),
    }
    assert {name: shapes[name] for name in expected} == expected


def test_bisenet_of_another_net_names_the_tensors_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "parsing_bisenet.pth")
    with pytest.raises(WeightsError, match=r"parsing_bisenet\.pth is not a BiSeNet"):
        load_bisenet(tmp_path / "parsing_bisenet.pth")


@pytest.mark.parametrize("name", ["parsing_bisenet.pth", "parsing_bisenet.safetensors"])
def test_load_bisenet_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(BiSeNet().state_dict(), path)
    else:
        save_file(BiSeNet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="is not a BiSeNet"):
        load_bisenet(path)
