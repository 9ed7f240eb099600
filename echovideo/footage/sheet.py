"""Pictures of a clip for people to look at: what was kept of it, or what made it unusable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from echovideo.footage.plan import Plan
from echovideo.footage.scan import Scan
from echovideo.footage.take import Take
from echovideo.video import stream_frames

FRAMES = 6
_WIDTH, _GAP = 960, 6
_FACE, _CROP, _TINT = (80, 220, 120), (255, 170, 60), (255, 60, 160)


def take_sheet(path: Path, take: Take) -> Image.Image:
    """Return three lines: the file's frames with face and crop drawn in, the crops with the face tinted, references."""
    plan = take.plan
    chosen = [round(at) for at in np.linspace(0, len(plan.frame_indices) - 1, FRAMES)]
    whole = _whole_frames(path, [plan.frame_indices[at] for at in chosen], plan)
    crops = [_tinted(take.frames_FHWC[at], take.face_FHW[at]) for at in chosen]
    faces = [Image.fromarray(identity.face_image) for identity in take.references.values()]
    lines = [_line(whole), _line(crops), _line(faces)]
    return _stacked(lines)


def scan_sheet(path: Path, scan: Scan) -> Image.Image:
    """Return one line of the file's frames with all faces drawn in, for footage that nothing could be taken of."""
    chosen = [scan.sightings[round(at)] for at in np.linspace(0, len(scan.sightings) - 1, FRAMES)]
    pictures = []
    found = {sighting.frame_index: sighting.faces for sighting in chosen}
    for frame in stream_frames(path, indices=set(found), max_side=2 * _WIDTH // FRAMES):
        picture = Image.fromarray(frame.pixels_HWC)
        draw = ImageDraw.Draw(picture)
        for face in found[frame.index]:
            draw.rectangle([side * frame.scale for side in face.box], outline=_FACE, width=2)
        pictures.append(picture)
    return _stacked([_line(pictures)])


def _whole_frames(path: Path, indices: Sequence[int], plan: Plan) -> list[Image.Image]:
    boxes = dict(zip(plan.frame_indices, plan.boxes, strict=True))
    pictures = []
    for frame in stream_frames(path, indices=set(indices), max_side=2 * _WIDTH // FRAMES):
        picture = Image.fromarray(frame.pixels_HWC)
        draw = ImageDraw.Draw(picture)
        draw.rectangle([side * frame.scale for side in boxes[frame.index]], outline=_FACE, width=2)
        left, top, right, bottom = (side * frame.scale for side in plan.crop)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_CROP, width=2)
        pictures.append(picture)
    return pictures


def _tinted(frame: NDArray[np.uint8], face: NDArray[np.float32]) -> Image.Image:
    tinted = frame + (np.array(_TINT) - frame) * (0.45 * face[:, :, None])
    return Image.fromarray(tinted.astype(np.uint8))


def _line(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return the pictures side by side, each as wide as a sixth of the sheet."""
    width = _WIDTH // FRAMES - _GAP
    scaled = [picture.resize((width, max(1, picture.height * width // picture.width))) for picture in pictures]
    line = Image.new("RGB", (_WIDTH, max(picture.height for picture in scaled) + _GAP), "white")
    for place, picture in enumerate(scaled):
        line.paste(picture, (place * (width + _GAP), 0))
    return line


def _stacked(lines: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (_WIDTH, sum(line.height for line in lines)), "white")
    top = 0
    for line in lines:
        sheet.paste(line, (0, top))
        top += line.height
    return sheet
