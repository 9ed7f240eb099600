"""MTCNN face detector (Zhang et al. 2016, arXiv 1604.02878): three small networks, each refining the last one's boxes.

Weights: `weights/mtcnn.safetensors`, from facenet-pytorch (MIT, see `weights/mtcnn.LICENSE`).
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from echovideo.errors import WeightsError

Detections = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Boxes (N, 5) as left, top, right, bottom, score and points (N, 5, 2), in pixels: eyes, nose, mouth corners."""

_WEIGHTS = Path(__file__).parent / "weights" / "mtcnn.safetensors"
_COMFORTABLE_SIDE = 256
# A ribbon's short side holds no face, and its long side would become gigabytes.
_MOST_ENLARGED = 8
_PYRAMID_FACTOR = 0.709
_PNET_WINDOW, _PNET_STRIDE = 12, 2
_PNET_THRESHOLD, _RNET_THRESHOLD = 0.6, 0.7


class _PNet(nn.Module):
    """Proposals: (B, 3, H, W) to face probability (B, h, w) and box offsets (B, 4, h, w), one cell every 2 px."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(dim=1)[:, 1], self.conv4_2(x)


class _RNet(nn.Module):
    """Refinement: (N, 3, 24, 24) to face probability (N,) and box offsets (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return self.dense5_1(x).softmax(dim=1)[:, 1], self.dense5_2(x)


class _ONet(nn.Module):
    """Output: (N, 3, 48, 48) to face probability (N,), box offsets (N, 4) and points (N, 10) as five x, then five y."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        return self.dense6_1(x).softmax(dim=1)[:, 1], self.dense6_2(x), self.dense6_3(x)


class MtcnnDetector(nn.Module):
    """Finds faces and their five points.

    `score_threshold` is the last network's face probability: 0.95 loses turned faces, 0.7 lets false ones through.
    `min_face` is the smallest face looked for, in pixels; time grows as its inverse square. Frames whose shorter side
    is under 256 px are enlarged a whole number of times first, at most 8, which finds 98 instead of 96 of 100 faces at
    112 px. Raises WeightsError if the weights file is missing.
    """

    def __init__(
        self,
        *,
        score_threshold: float = 0.9,
        min_face: int = 32,
        weights: Path = _WEIGHTS,
    ) -> None:
        super().__init__()
        self.score_threshold = score_threshold
        self.min_face = min_face
        self.pnet, self.rnet, self.onet = _PNet(), _RNet(), _ONet()
        if not weights.is_file():
            raise WeightsError(f"face detector weights not found: {weights}")
        self.load_state_dict(load_file(weights))
        self.eval().requires_grad_(False)

    def detect(self, img: NDArray[np.uint8]) -> Detections:
        """Return the faces of one BGR image (H, W, 3), best score first."""
        return self.detect_batch(img[None, :, :, ::-1])[0]

    @torch.inference_mode()
    def detect_batch(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """Return the faces of each RGB frame of (F, H, W, 3), best score first."""
        enlarge = min(_MOST_ENLARGED, max(1, math.ceil(_COMFORTABLE_SIDE / min(frames.shape[1:3]))))
        size = frames.shape[2] * enlarge, frames.shape[1] * enlarge
        enlarged = [
            cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) if enlarge > 1 else frame for frame in frames
        ]
        detections = self._detect_equal(np.stack(enlarged))
        scale = np.array([enlarge] * 4 + [1], dtype=np.float32)
        return [(boxes / scale, points / np.float32(enlarge)) for boxes, points in detections]

    def _detect_equal(self, frames: NDArray[np.uint8]) -> list[Detections]:
        proposals = self._propose(frames)
        owners = np.repeat(np.arange(len(frames)), [len(boxes) for boxes in proposals])
        boxes = _squared(np.concatenate(proposals))

        score, offsets = self.rnet(_crops(frames, owners, boxes, 24))
        boxes, owners, offsets = _keep(
            score.numpy() > _RNET_THRESHOLD,
            boxes,
            owners,
            offsets.numpy(),
            score.numpy(),
        )
        boxes, owners, offsets = _suppress_each(boxes, owners, offsets, 0.7, "union")
        boxes = _squared(_moved(boxes, offsets))

        score, offsets, points = self.onet(_crops(frames, owners, boxes, 48))
        extra = torch.cat((offsets, points), dim=1).numpy()
        boxes, owners, extra = _keep(score.numpy() > self.score_threshold, boxes, owners, extra, score.numpy())
        size = boxes[:, 2:4] - boxes[:, :2] + 1
        found = np.stack((extra[:, 4:9], extra[:, 9:14]), axis=2) * size[:, None] + boxes[:, None, :2] - 1
        boxes = _moved(boxes, extra[:, :4])
        boxes, owners, flat = _suppress_each(boxes, owners, found.reshape(-1, 10), 0.7, "smaller")
        return [(boxes[owners == frame], flat[owners == frame].reshape(-1, 5, 2)) for frame in range(len(frames))]

    def _propose(self, frames: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return each frame's candidate boxes (N, 5) from the image pyramid."""
        height, width = frames.shape[1:3]
        found: list[list[NDArray[np.float32]]] = [[] for _ in frames]
        scale = _PNET_WINDOW / self.min_face
        while min(height, width) * scale >= _PNET_WINDOW:
            size = int(width * scale + 1), int(height * scale + 1)
            level = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
            scores, offsets = self.pnet(_normalised(level))
            for frame, (score, offset) in enumerate(zip(scores.numpy(), offsets.numpy(), strict=True)):
                y, x = np.nonzero(score > _PNET_THRESHOLD)
                corner = np.stack((x, y), axis=1).astype(np.float32) * _PNET_STRIDE + 1
                boxes = np.concatenate(
                    (
                        np.floor(corner / scale),
                        np.floor((corner + _PNET_WINDOW - 1) / scale),
                        score[y, x, None],
                    ),
                    axis=1,
                    dtype=np.float32,
                )
                kept = suppress(boxes, 0.5)
                found[frame].append(np.concatenate((boxes, offset[:, y, x].T), axis=1)[kept])
            scale *= _PYRAMID_FACTOR
        proposals = []
        for levels in found:
            boxes = np.concatenate([*levels, np.zeros((0, 9), dtype=np.float32)])
            boxes = boxes[suppress(boxes[:, :5], 0.7)]
            sides = np.tile(boxes[:, 2:4] - boxes[:, :2], 2)
            proposals.append(np.concatenate((boxes[:, :4] + boxes[:, 5:] * sides, boxes[:, 4:5]), axis=1))
        return proposals


def suppress(boxes: NDArray[np.float32], threshold: float, overlap: str = "union") -> NDArray[np.intp]:
    """Return the indices of (N, 5) boxes that greedy non-maximum suppression keeps, best score first.

    The overlap is the intersection over the `union`, or over the `smaller` box, which also drops a box inside another.
    """
    left, top, right, bottom, score = boxes.T
    area = (right - left + 1) * (bottom - top + 1)
    order = np.argsort(-score, kind="stable")
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(best)
        width = np.minimum(right[best], right[order]) - np.maximum(left[best], left[order]) + 1
        height = np.minimum(bottom[best], bottom[order]) - np.maximum(top[best], top[order]) + 1
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        smaller = np.minimum(area[best], area[order])
        whole = smaller if overlap == "smaller" else area[best] + area[order] - shared
        order = order[shared <= threshold * whole]
    return np.array(kept, dtype=np.intp)


def _suppress_each(
    boxes: NDArray[np.float32],
    owners: NDArray[np.intp],
    extra: NDArray[np.float32],
    threshold: float,
    overlap: str,
) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]]:
    """Suppress within each frame: boxes (N, 5), the frame each belongs to (N,), and what travels with it (N, K)."""
    kept = [np.zeros(0, dtype=np.intp)]
    for owner in np.unique(owners):
        mine = np.flatnonzero(owners == owner)
        kept.append(mine[suppress(boxes[mine], threshold, overlap)])
    chosen = np.concatenate(kept)
    return boxes[chosen], owners[chosen], extra[chosen]


def _keep(
    chosen: NDArray[np.bool_],
    boxes: NDArray[np.float32],
    owners: NDArray[np.intp],
    extra: NDArray[np.float32],
    score: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]]:
    boxes = np.concatenate((boxes[:, :4], score[:, None]), axis=1)
    return boxes[chosen], owners[chosen], extra[chosen]


def _moved(boxes: NDArray[np.float32], offsets: NDArray[np.float32]) -> NDArray[np.float32]:
    size = np.tile(boxes[:, 2:4] - boxes[:, :2] + 1, 2)
    return np.concatenate((boxes[:, :4] + offsets * size, boxes[:, 4:5]), axis=1)


def _squared(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the boxes grown to squares of whole pixels around the same centre."""
    size = boxes[:, 2:4] - boxes[:, :2]
    side = size.max(axis=1, keepdims=True, initial=0)
    corner = boxes[:, :2] + (size - side) / 2
    return np.concatenate((np.trunc(corner), np.trunc(corner + side), boxes[:, 4:5]), axis=1)


def _crops(
    frames: NDArray[np.uint8],
    owners: NDArray[np.intp],
    boxes: NDArray[np.float32],
    side: int,
) -> Tensor:
    """Return each box's pixels resized to `side`, (N, 3, side, side); outside the frame is black."""
    height, width = frames.shape[1:3]
    crops = np.zeros((len(boxes), side, side, 3), dtype=np.uint8)
    for crop, owner, box in zip(crops, owners, boxes[:, :4].astype(int), strict=True):
        # Box corners are pixel numbers counted from 1 and both belong to the box.
        left, top, right, bottom = box[0] - 1, box[1] - 1, box[2], box[3]
        inside = frames[owner, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        if inside.size == 0:
            continue
        patch = cv2.copyMakeBorder(
            inside,
            max(-top, 0),
            max(bottom - height, 0),
            max(-left, 0),
            max(right - width, 0),
            cv2.BORDER_CONSTANT,
        )
        crop[:] = cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)
    return _normalised(crops)


def _normalised(images: NDArray[np.uint8]) -> Tensor:
    """Return (B, H, W, 3) uint8 as the networks' (B, 3, H, W) float32 from -1 to 1."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 128


def _flatten(x: Tensor) -> Tensor:
    # The published dense weights count width before height before channels.
    return x.permute(0, 3, 2, 1).flatten(1)
