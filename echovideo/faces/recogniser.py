"""The embedded face recogniser: dlib's 29-convolution ResNet as one differentiable torch module.

Weights: Davis King's `dlib_face_recognition_resnet_model_v1.dat` (CC0), shipped by face-recognition-models.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from echovideo.errors import WeightsError

EMBEDDING_WIDTH = 128

_WEIGHTS_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
_PIXEL_MEAN = (122.782, 117.001, 104.298)
_CHIP_SIDE = 150
_CROP_SIDE = 112
# Pixels of the 112 px ArcFace crop to pixels of dlib's 150 px face chip: the similarity between the two templates.
_CROP_TO_CHIP = ((1.6355, -0.0184, -17.40), (0.0184, 1.6355, -51.75))
# (input channels, output channels, halves the resolution) of each residual block.
_BLOCKS = (
    *((32, 32, False),) * 3,
    (32, 64, True),
    *((64, 64, False),) * 3,
    (64, 128, True),
    *((128, 128, False),) * 2,
    (128, 256, True),
    *((256, 256, False),) * 2,
    (256, 256, True),
)


class _ConvAffine(nn.Module):
    """A convolution and the per-channel scale and shift that dlib freezes its batch norm into."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.scale = nn.Parameter(torch.ones(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * self.scale[:, None, None] + self.shift[:, None, None]
        return out


class _Block(nn.Module):
    """Residual block; a halving one averages its shortcut and pads the smaller branch with zeros, as dlib does."""

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.first = _ConvAffine(inputs, outputs, 3, 2 if halves else 1, 0 if halves else 1)
        self.second = _ConvAffine(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(functional.relu(self.first(x)))
        if self.halves:
            x = functional.avg_pool2d(x, 2)
            missing = x.shape[2] - branch.shape[2], x.shape[3] - branch.shape[3]
            branch = functional.pad(branch, (0, missing[1], 0, missing[0]))
            x = functional.pad(x, (0, 0, 0, 0, 0, branch.shape[1] - x.shape[1]))
        return functional.relu(x + branch)


class DlibFaceRecogniser(nn.Module):
    """Maps aligned ArcFace crops to 128 numbers; two crops of one person lie less than about 0.6 apart (L2).

    Input: float (B, 3, 112, 112), RGB, (pixel - 127.5) / 127.5, aligned by insightface's `norm_crop`. The mean and
    scale are undone and the crop is warped to dlib's 150 px chip inside, so that insightface's ArcFaceONNX can feed
    the export.
    Output: float (B, 128), not normalised. Differentiable in the input.
    """

    crop_grid: Tensor
    pixel_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvAffine(3, 32, 7, 2, 0)
        self.blocks = nn.Sequential(*(_Block(*block) for block in _BLOCKS))
        self.head = nn.Linear(256, EMBEDDING_WIDTH, bias=False)
        self.register_buffer("crop_grid", _crop_grid(), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(_PIXEL_MEAN)[:, None, None], persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        grid = self.crop_grid.expand(crops.shape[0], -1, -1, -1)
        chips = functional.grid_sample(crops, grid, mode="bilinear", padding_mode="border", align_corners=True)
        return self.embed(chips * 127.5 + 127.5)

    def embed(self, chips: Tensor) -> Tensor:
        """Return what dlib itself gives, (B, 128), for its face chips (B, 3, 150, 150), RGB, 0 to 255."""
        x = (chips - self.pixel_mean) / 256
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def load_recogniser(path: Path | None = None) -> DlibFaceRecogniser:
    """Return the recogniser in eval mode with frozen parameters, read from dlib's .dat file.

    `path` defaults to the file inside the installed face-recognition-models package.
    Raises WeightsError if the file is missing or not the published one.
    """
    path = path or _packaged_weights()
    if not path.is_file():
        raise WeightsError(f"face recogniser weights not found: {path}; reinstall face-recognition-models 0.3.0")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise WeightsError(f"{path} is damaged or another model: sha256 {digest}, expected {_WEIGHTS_SHA256}")
    model = DlibFaceRecogniser()
    _read_dlib(model, data)
    return model.eval().requires_grad_(False)


def export_recogniser(path: Path) -> None:
    """Write the recogniser as ONNX, (batch, 3, 112, 112) to (batch, 128), for insightface's ArcFaceONNX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        load_recogniser(),
        (torch.zeros(1, 3, _CROP_SIDE, _CROP_SIDE),),
        str(path),
        # The new exporter needs onnxscript; this one needs nothing.
        dynamo=False,
        opset_version=17,
        input_names=["crops"],
        output_names=["embeddings"],
        dynamic_axes={"crops": {0: "batch"}, "embeddings": {0: "batch"}},
    )


def _packaged_weights() -> Path:
    # Located, not imported: the package's __init__ needs pkg_resources, which newer setuptools dropped.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            "the face-recognition-models package is not installed; install face-recognition-models 0.3.0"
        )
    return Path(spec.submodule_search_locations[0]) / "models" / "dlib_face_recognition_resnet_model_v1.dat"


def _crop_grid() -> Tensor:
    """Return (1, 150, 150, 2): where in the crop each chip pixel samples, in grid_sample's -1 to 1 coordinates."""
    crop_to_chip = torch.tensor(_CROP_TO_CHIP, dtype=torch.float64)
    chip_to_crop = torch.linalg.inv(crop_to_chip[:, :2])
    axis = torch.arange(_CHIP_SIDE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    crop = (torch.stack((x, y), dim=-1) - crop_to_chip[:, 2]) @ chip_to_crop.T
    grid: Tensor = (crop / (_CROP_SIDE - 1) * 2 - 1).float()[None]
    return grid


def _read_dlib(model: DlibFaceRecogniser, data: bytes) -> None:
    """Fill `model` from dlib's serialised network: layers from input to output, each tensor a header then float32."""
    position = 0

    def read(*shape: int) -> Tensor:
        # dlib writes an integer as its byte count and then its bytes; a tensor as version 2, four sizes, values.
        nonlocal position
        header = b"".join(_dlib_integer(n) for n in (2, *shape))
        start = data.index(header, position) + len(header)
        position = start + 4 * torch.Size(shape).numel()
        return torch.frombuffer(bytearray(data[start:position]), dtype=torch.float32)

    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, _ConvAffine):
                continue
            weight, bias = layer.conv.weight, layer.conv.bias
            assert bias is not None
            parameters = read(weight.numel() + bias.numel(), 1, 1, 1)
            weight.copy_(parameters[: weight.numel()].view_as(weight))
            bias.copy_(parameters[weight.numel() :])
            affine = read(2 * len(bias), 1, 1, 1)
            layer.scale.copy_(affine[: len(bias)])
            layer.shift.copy_(affine[len(bias) :])
        model.head.weight.copy_(read(256, EMBEDDING_WIDTH, 1, 1).view(256, EMBEDDING_WIDTH).T)


def _dlib_integer(value: int) -> bytes:
    encoded = value.to_bytes((value.bit_length() + 7) // 8, "little")
    return bytes((len(encoded),)) + encoded
