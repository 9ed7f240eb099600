"""Drawn clips and reference photos for training, by number: sample n of a purpose is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from echovideo.synthetic.clip import ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing, draw_tensors
from echovideo.synthetic.person import identity_parameters
from echovideo.tiny.faces import face_image
from echovideo.tiny.parts import FACE_TOKENS_SIDE, FRAMES, SIDE

REFERENCE_SIDE = 192
"""Height and width of a drawn reference photo, pixels."""
TEST_CLIPS = 3_000_000_000
"""The first clip seed that no training uses; training's begin at 0. Seeds count modulo 2**32."""
_POINT_NOISE = 0.04


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceFaces:
    """What the model's encoders take of B reference photos, float, 0 to 1, black outside face and hair.

    `tokens_BCHW` (B, 3, 112, 112) for the vision tower, `latents_BCHW` (B, 3, 96, 96) for the autoencoder.
    """

    tokens_BCHW: Tensor  # noqa: N815
    latents_BCHW: Tensor  # noqa: N815


def draw_clips(
    people: Sequence[int], clips: Sequence[int], device: torch.device, *, frames: int = FRAMES
) -> tuple[Drawing, list[ClipCondition]]:
    """Return clips of the people of seeds `people` under the conditions of seeds `clips`, and the conditions."""
    conditions = sample_conditions(clips)
    return _draw(people, scene_curves(conditions, frames), SIDE, device), conditions


def draw_photos(people: Sequence[int], conditions: Sequence[ClipCondition], device: torch.device) -> Drawing:
    """Return a photo of each person: the middle frame of a clip under the condition beside it, 192 pixels high."""
    return _draw(people, scene_curves(conditions, 3)[:, 1:2], REFERENCE_SIDE, device)


def noisy_points(drawing: Drawing, generator: torch.Generator) -> Tensor:
    """Return the drawing's five points (N, 5, 2) as far off as a detector's: 4 % of the eye distance."""
    points = drawing.landmarks_BF52.flatten(0, 1)
    eyes = (points[:, 0] - points[:, 1]).norm(dim=1)[:, None, None]
    noise = torch.randn(points.shape, generator=generator, device=points.device)
    moved: Tensor = points + _POINT_NOISE * eyes * noise
    return moved


def reference_faces(photos: Drawing, points_N52: Tensor) -> ReferenceFaces:
    """Return the aligned faces of photos, by the five points given."""
    return ReferenceFaces(
        tokens_BCHW=face_image(photos, points_N52, FACE_TOKENS_SIDE),
        latents_BCHW=face_image(photos, points_N52, SIDE),
    )


def split_frames(drawing: Drawing, frames: int) -> tuple[Drawing, Drawing]:
    """Return a drawing's first frames and the rest of them."""
    first, second = (
        Drawing(**{field.name: getattr(drawing, field.name)[:, part] for field in fields(drawing)})
        for part in (slice(0, frames), slice(frames, None))
    )
    return first, second


def _draw(people: Sequence[int], scene_BFS: Tensor, side: int, device: torch.device) -> Drawing:
    identity = identity_parameters(torch.tensor(list(people), device=device))
    return draw_tensors(identity, scene_BFS.to(device), side, side)
