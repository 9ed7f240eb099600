"""Background removal on the aligned 512 px face: which pixels are the person's face and hair.

Two ways: BiSeNet (Yu et al. 2018, arXiv 1808.00897) trained on CelebAMask-HQ, as published, and MediaPipe's face mesh
and person segmentation, whose weights are small enough to ship (Apache-2.0, see `weights/mediapipe.LICENSE`).
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import cv2
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from echovideo.errors import WeightsError
from echovideo.faces.templates import FACE_SIDE

# CelebAMask-HQ labels painted black: background, ears, earring, neck, necklace, cloth, hat. Skin, brows, eyes, glasses,
# nose, mouth, lips and hair stay.
REMOVED_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
_LABELS = 19
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_WEIGHTS = Path(__file__).parent / "weights"
_MESH_SIDE, _PERSON_SIDE = 192, 256
# The mesh expects a margin around the face, and the aligned face fills its square.
_MESH_MARGIN = 64
# The face's outline in MediaPipe's 468 mesh points, clockwise from the top of the forehead.
_OUTLINE = [
    *(
        10,
        338,
        297,
        332,
        284,
        251,
        389,
        356,
        454,
        323,
        361,
        288,
        397,
        365,
        379,
        378,
        400,
        377,
    ),
    *(
        152,
        148,
        176,
        149,
        150,
        136,
        172,
        58,
        132,
        93,
        234,
        127,
        162,
        21,
        54,
        103,
        67,
        109,
    ),
]
_LEFT_BROW_END, _RIGHT_BROW_END, _CHIN = 21, 251, 152


class FaceParser(Protocol):
    """Tells the face and hair from all else in an aligned face."""

    def mask(self, face: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (512, 512) bool, true where the RGB `face` (512, 512, 3) shows face or hair."""
        ...


class MeshParser:
    """MediaPipe's face mesh and person segmentation: face outline, and hair above and beside it.

    Ears, neck, clothes and background go. A hat stays: neither network knows one. Two LiteRT networks, one thread each.
    """

    def __init__(self) -> None:
        self._mesh = _interpreter(_WEIGHTS / "face_landmark.tflite")
        self._person = _interpreter(_WEIGHTS / "selfie_segmentation.tflite")

    def mask(self, face: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (512, 512) bool, true where the RGB `face` (512, 512, 3) shows face or hair."""
        assert face.shape == (FACE_SIDE, FACE_SIDE, 3)
        points = self._mesh_points(face)
        outline = _polygon(points[_OUTLINE])
        person = self._person_mask(face)
        left, right, chin = (
            points[_LEFT_BROW_END],
            points[_RIGHT_BROW_END],
            points[_CHIN],
        )
        # Above the brows whatever else is the person is hair; the ears begin below.
        above = _polygon(
            np.array(
                [
                    (0, 0),
                    (0, left[1]),
                    left,
                    right,
                    (FACE_SIDE, right[1]),
                    (FACE_SIDE, 0),
                ],
                dtype=np.float32,
            )
        )
        crown = person & above & ~outline
        beside = person & ~above & ~outline & (np.arange(FACE_SIDE)[:, None] < chin[1])
        kept = outline | crown | _hair_beside(face, crown, beside, outline)
        # The outline runs just inside the face's edge: close the slit to the hair beside it.
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (21, 21))
        closed = cv2.morphologyEx(
            kept.astype(np.uint8),
            cv2.MORPH_CLOSE,
            disc,
            borderType=cv2.BORDER_CONSTANT,
            borderValue=0,
        )
        mask: NDArray[np.bool_] = kept | ((closed > 0) & beside)
        return mask

    def _mesh_points(self, face: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mesh's (468, 2) points in pixels of `face`."""
        padded = np.pad(face, ((_MESH_MARGIN,) * 2, (_MESH_MARGIN,) * 2, (0, 0)), mode="edge")
        flat = _run(self._mesh, padded, _MESH_SIDE)
        points: NDArray[np.float32] = flat.reshape(468, 3)[:, :2] * (padded.shape[0] / _MESH_SIDE) - _MESH_MARGIN
        return points

    def _person_mask(self, face: NDArray[np.uint8]) -> NDArray[np.bool_]:
        probability = _run(self._person, face, _PERSON_SIDE).reshape(_PERSON_SIDE, _PERSON_SIDE)
        mask: NDArray[np.bool_] = cv2.resize(probability, (FACE_SIDE, FACE_SIDE)) > 0.5
        return mask


class BiSeNetParser:
    """The published parser: BiSeNet's 19 labels, those of `REMOVED_LABELS` taken away."""

    def __init__(self, checkpoint: Path, device: torch.device | str = "cpu") -> None:
        """Load facexlib's `parsing_bisenet.pth`, or the same tensors as safetensors; raises WeightsError."""
        self._net = load_bisenet(checkpoint).to(device)
        self._device = device
        self._mean = torch.tensor(_IMAGENET_MEAN, device=device)[:, None, None]
        self._std = torch.tensor(_IMAGENET_STD, device=device)[:, None, None]

    @torch.inference_mode()
    def labels(self, face: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return (512, 512) CelebAMask-HQ labels of the RGB `face` (512, 512, 3)."""
        assert face.shape == (FACE_SIDE, FACE_SIDE, 3)
        image = torch.from_numpy(np.ascontiguousarray(face)).to(self._device).permute(2, 0, 1).float() / 255
        labels: NDArray[np.int64] = self._net(((image - self._mean) / self._std)[None])[0].argmax(dim=0).cpu().numpy()
        return labels

    def mask(self, face: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (512, 512) bool, true where the RGB `face` (512, 512, 3) shows face or hair."""
        return ~np.isin(self.labels(face), REMOVED_LABELS)


def load_bisenet(checkpoint: Path) -> BiSeNet:
    """Return BiSeNet in eval mode from a .pth or .safetensors file; raises WeightsError naming what does not fit."""
    if not checkpoint.is_file():
        raise WeightsError(f"face parser weights not found: {checkpoint}")
    model = BiSeNet()
    try:
        state = (
            load_file(checkpoint)
            if checkpoint.suffix == ".safetensors"
            else torch.load(checkpoint, map_location="cpu", weights_only=True)
        )
        model.load_state_dict(state)
    except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(f"{checkpoint} is not a BiSeNet face parser with {_LABELS} labels: {error}") from error
    return model.eval().requires_grad_(False)


class _ConvBNReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(self.downsample(x) + branch)


class _ResNet18(nn.Module):
    """ResNet-18 without its classifier; returns features at 1/8 (128), 1/16 (256) and 1/32 (512 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(_BasicBlock(256, 512, 2), _BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class _AttentionRefinement(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(inputs, outputs)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.conv(x)
        weights: Tensor = self.bn_atten(self.conv_atten(features.mean(dim=(2, 3), keepdim=True))).sigmoid()
        return features * weights


class _ContextPath(nn.Module):
    """Features at 1/8 straight from the backbone, and at 1/8 and 1/16 with context mixed in from above."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = _ResNet18()
        self.arm16 = _AttentionRefinement(256, 128)
        self.arm32 = _AttentionRefinement(512, 128)
        self.conv_head32 = _ConvBNReLU(128, 128)
        self.conv_head16 = _ConvBNReLU(128, 128)
        self.conv_avg = _ConvBNReLU(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eighth, sixteenth, thirty_second = self.resnet(x)
        whole = self.conv_avg(thirty_second.mean(dim=(2, 3), keepdim=True))
        context = self.arm32(thirty_second) + whole
        context = self.conv_head32(functional.interpolate(context, sixteenth.shape[2:], mode="nearest"))
        context = self.arm16(sixteenth) + context
        context = self.conv_head16(functional.interpolate(context, eighth.shape[2:], mode="nearest"))
        return eighth, context


class _FeatureFusion(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convblk = _ConvBNReLU(channels, channels, 1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        features: Tensor = self.convblk(torch.cat((spatial, context), dim=1))
        weights: Tensor = self.conv2(functional.relu(self.conv1(features.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return features + features * weights


class _Output(nn.Module):
    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(inputs, middle)
        self.conv_out = nn.Conv2d(middle, _LABELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv(x))
        return out


class BiSeNet(nn.Module):
    """BiSeNet face parser with facexlib's parameter names: (B, 3, H, W), ImageNet-normalised RGB, to (B, 19, H, W).

    `conv_out16` and `conv_out32` are training's auxiliary heads; they are here so that the published file loads whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _FeatureFusion(256)
        self.conv_out = _Output(256, 256)
        self.conv_out16 = _Output(128, 64)
        self.conv_out32 = _Output(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        spatial, context = self.cp(x)
        labels = self.conv_out(self.ffm(spatial, context))
        return functional.interpolate(labels, x.shape[2:], mode="bilinear", align_corners=True)


def _hair_beside(
    face: NDArray[np.uint8],
    crown: NDArray[np.bool_],
    beside: NDArray[np.bool_],
    skin: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return the part of `beside` that looks more like the hair of `crown` than like `skin` and hangs on to the crown.

    Each is one Gaussian over the Lab colours; ears and neck go with the skin, clothes are far from both.
    """
    if min(np.count_nonzero(crown), np.count_nonzero(skin)) < 500:
        return np.zeros_like(beside)
    colours = cv2.cvtColor(cv2.GaussianBlur(face, (0, 0), 3), cv2.COLOR_RGB2LAB).astype(np.float32)
    hair_distance, hair_volume = _gaussian(colours[beside], colours[crown])
    skin_distance, skin_volume = _gaussian(colours[beside], colours[skin])
    strands = np.zeros(beside.shape, dtype=np.uint8)
    strands[beside] = (hair_distance + hair_volume < skin_distance + skin_volume) & (hair_distance < 9)
    opened = cv2.morphologyEx(strands, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8)) > 0
    _, parts = cv2.connectedComponents((opened | crown).astype(np.uint8))
    hanging: NDArray[np.bool_] = opened & np.isin(parts, np.unique(parts[crown]))
    return hanging


def _gaussian(colours: NDArray[np.float32], sample: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Return squared Mahalanobis distances of `colours` (N, 3) to those of `sample`, and the log covariance volume."""
    offset = colours - np.median(sample, axis=0)
    # Flat areas have hardly any spread; 30 is about 5 levels a channel.
    covariance = np.cov(sample.T) + 30 * np.eye(3)
    distance = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset, optimize=True)
    return distance, float(np.linalg.slogdet(covariance)[1])


def _interpreter(path: Path) -> Interpreter:
    if not path.is_file():
        raise WeightsError(f"face parser weights not found: {path}")
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def _run(interpreter: Interpreter, image: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Return the first output for an RGB image resized to `side` and scaled to 0..1."""
    resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"],
        resized[None].astype(np.float32) / 255,
    )
    interpreter.invoke()
    output: NDArray[np.float32] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return output


def _polygon(points: NDArray[np.float32]) -> NDArray[np.bool_]:
    canvas = np.zeros((FACE_SIDE, FACE_SIDE), dtype=np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(np.bool_)
