"""Reference faces of the drawn world on the GPU: what FaceAnalyzer makes of a photo, from a drawing's known points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echovideo.faces.templates import ALIGNED_POINTS, FACE_SIDE, RECOGNITION_POINTS, RECOGNITION_SIDE
from echovideo.synthetic.draw import Drawing


def face_image(drawing: Drawing, points_N52: Tensor, side: int) -> Tensor:
    """Return the aligned face of each of a drawing's frames (N, 3, side, side), 0 to 1, black outside face and hair.

    `points_N52` are the five points to align by, in pixels, N being clips x frames. The published alignment, at
    `side` instead of 512 pixels.
    """
    pictures = drawing.frames_BFCHW.flatten(0, 1)
    shown = (drawing.face_BFHW + drawing.hair_BFHW).clamp(max=1).flatten(0, 1)[:, None]
    template = torch.tensor(ALIGNED_POINTS).to(points_N52)
    # Twice the side and averaged: as free of aliasing as a resized 512 px face.
    large = warp(pictures * shown, points_N52, template + 0.5, FACE_SIDE, 2 * side)
    return F.avg_pool2d(large, 2)


def recognition_crop(drawing: Drawing, points_N52: Tensor) -> Tensor:
    """Return the recogniser's input of each of a drawing's frames (N, 3, 112, 112), (pixel - 127.5) / 127.5."""
    template = torch.tensor(RECOGNITION_POINTS).to(points_N52)
    pictures = drawing.frames_BFCHW.flatten(0, 1)
    return warp(pictures, points_N52, template + 0.5, RECOGNITION_SIDE, RECOGNITION_SIDE) * 2 - 1


def warp(pictures_NCHW: Tensor, points_N52: Tensor, template_52: Tensor, template_side: int, side: int) -> Tensor:
    """Return (N, C, side, side): each picture under the similarity that brings its points nearest to the template's.

    Least squares (Umeyama 1991, with no reflection); points and template in pixels whose centres lie at .5.
    """
    centre, target = points_N52.mean(1, keepdim=True), template_52.mean(0)
    (x, y), (u, v) = (points_N52 - centre).unbind(-1), (template_52 - target).unbind(-1)
    # The complex slope that takes the points nearest to the template, as the analyzer fits it, and its inverse
    # (x, y) = (a u - b v, b u + a v) + centre. Fitted the other way, a turned face would come out larger.
    real, imaginary = (x * u + y * v).sum(1), (y * u - x * v).sum(1)
    inverse = (x * x + y * y).sum(1) / (real.square() + imaginary.square())
    a, b = real * inverse, imaginary * inverse
    axis = (torch.arange(side, device=points_N52.device, dtype=points_N52.dtype) + 0.5) * (template_side / side)
    v, u = torch.meshgrid(axis - target[1], axis - target[0], indexing="ij")
    a, b = a[:, None, None], b[:, None, None]
    picture_x = a * u - b * v + centre[:, :, 0, None]
    picture_y = b * u + a * v + centre[:, :, 1, None]
    height, width = pictures_NCHW.shape[-2:]
    grid = torch.stack((picture_x / width, picture_y / height), dim=-1) * 2 - 1
    return F.grid_sample(pictures_NCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
