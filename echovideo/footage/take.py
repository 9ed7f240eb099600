"""The pixels that a plan asks for: the example's frames, where they show the face, and the reference faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from echovideo.conditioning import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from echovideo.errors import PhotoRefusedError
from echovideo.faces.analyzer import MAX_DETECTION_SIDE, FaceAnalyzer, FrameFace, Identity, align_face, alignment
from echovideo.faces.parsing import FaceParser
from echovideo.footage.plan import Box, Plan, Seen
from echovideo.footage.scan import FootageError, scaled
from echovideo.video import StreamedFrame, stream_frames


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Take:
    """What training takes of one clip.

    `frames_FHWC` uint8 RGB, cropped and scaled to the plan's size. `face_FHW` float32, 0 to 1: the share of each pixel
    that shows face or hair. `references` by frame number, each an Identity of the person, in pixels of
    the frame with its longer side at most 1024.
    """

    plan: Plan
    frames_FHWC: NDArray[np.uint8]  # noqa: N815
    face_FHW: NDArray[np.float32]  # noqa: N815
    references: Mapping[int, Identity]


def take_footage(path: Path, plan: Plan, analyzer: FaceAnalyzer, footage_sha256: str) -> Take:
    """Return the plan's pixels. Raises FootageError `no_reference` when every face is too small, turned or blurred."""
    tried = {seen.frame_index for part in plan.references for seen in part}
    at = {index: place for place, index in enumerate(plan.frame_indices)}
    frames: list[NDArray[np.uint8]] = []
    faces: list[NDArray[np.float32]] = []
    photos: dict[int, StreamedFrame] = {}
    for frame in stream_frames(path, indices={*tried, *at}):
        if frame.index in at:
            left, top, right, bottom = plan.crop
            frames.append(_resized(frame.pixels_HWC[top:bottom, left:right], plan.width, plan.height))
            place = at[frame.index]
            faces.append(face_mask(frame.pixels_HWC, plan.faces[place], plan.boxes[place], plan, analyzer.pack.parser))
        if frame.index in tried:
            scale = min(1.0, MAX_DETECTION_SIDE / max(frame.pixels_HWC.shape))
            height, width = (int(side * scale) for side in frame.pixels_HWC.shape[:2])
            photos[frame.index] = StreamedFrame(frame.index, _resized(frame.pixels_HWC, width, height), scale)
    references: dict[int, Identity] = {}
    for part in plan.references:
        references |= _reference(part, photos, analyzer, footage_sha256)
    if not references:
        raise FootageError(
            "no face of the clip can be a reference: each is too small, turned away or blurred. Use footage that shows "
            "the person from the front at least once",
            code="no_reference",
            numbers={"faces_tried": len(tried)},
        )
    return Take(plan=plan, frames_FHWC=np.stack(frames), face_FHW=np.stack(faces), references=references)


def face_mask(
    frame: NDArray[np.uint8], face: FrameFace | None, box: Box, plan: Plan, parser: FaceParser
) -> NDArray[np.float32]:
    """Return the share of each pixel of the cropped, scaled frame (height, width) that shows face or hair.

    The parser sees the aligned face; its mask is warped back. Where the face was not seen, or the parser finds none in
    it, the box stands for it.
    """
    left, top, right, bottom = plan.crop
    # Pixel centres are at whole numbers: from the crop's pixels to the file's.
    scale_x, scale_y = (right - left) / plan.width, (bottom - top) / plan.height
    to_file = np.array([[scale_x, 0, left + scale_x / 2 - 0.5], [0, scale_y, top + scale_y / 2 - 0.5], [0, 0, 1]])
    if face is not None:
        mask = parser.mask(align_face(frame, face.landmarks))
        if mask.any():
            warped = cv2.warpAffine(
                mask.astype(np.float32),
                alignment(face.landmarks) @ to_file,
                (plan.width, plan.height),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            )
            return np.asarray(warped, dtype=np.float32)
    x = (np.arange(plan.width) * scale_x + to_file[0, 2]).clip(0)
    y = (np.arange(plan.height) * scale_y + to_file[1, 2]).clip(0)
    inside: NDArray[np.bool_] = ((x >= box[0]) & (x <= box[2]))[None] & ((y >= box[1]) & (y <= box[3]))[:, None]
    return np.asarray(inside, dtype=np.float32)


def face_share(face_FHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the share of each latent cell that shows the face, 0 to 255: (F, H, W) to (1 + (F - 1) / 4, H / 8, W / 8).

    A latent frame stands for four frames, the first one for the first frame alone.
    """
    frames, height, width = face_FHW.shape
    assert (frames - 1) % TEMPORAL_COMPRESSION == 0, face_FHW.shape
    cell = SPATIAL_COMPRESSION
    cells = face_FHW.reshape(frames, height // cell, cell, width // cell, cell).mean(axis=(2, 4))
    later = cells[1:].reshape(-1, TEMPORAL_COMPRESSION, *cells.shape[1:]).mean(axis=1)
    return np.asarray(np.rint(np.concatenate((cells[:1], later)) * 255), dtype=np.uint8)


def _reference(
    part: Sequence[Seen], photos: Mapping[int, StreamedFrame], analyzer: FaceAnalyzer, footage_sha256: str
) -> dict[int, Identity]:
    """Return the first of the part's faces that is good enough, by frame, or nothing."""
    for seen in part:
        photo = photos[seen.frame_index]
        try:
            identity = analyzer.identify(photo.pixels_HWC, scaled(seen.face, photo.scale), footage_sha256)
        except PhotoRefusedError:
            continue
        return {seen.frame_index: identity}
    return {}


def _resized(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] * image.shape[1] > height * width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), dtype=np.uint8)
