"""From a photo to an identity: detect, align, remove the background, recognise; the same nets also judge frames."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import safetensors
import safetensors.numpy
from insightface.utils.face_align import norm_crop
from numpy.typing import NDArray

from echovideo.errors import PhotoRefusedError
from echovideo.faces.mtcnn import Detections, MtcnnDetector
from echovideo.faces.packs import EMBEDDED_KIND, FacePack
from echovideo.faces.photo import decode_photo
from echovideo.faces.templates import ALIGNED_POINTS, FACE_SIDE, RECOGNITION_SIDE
from echovideo.request import FacePolicy, check_choice

MAX_DETECTION_SIDE = 1024

# facexlib's grey for what lies outside the photo, RGB; the parser takes it for background.
_OUTSIDE = (132, 133, 135)
# The same five points on a generic head, in half eye distances: right, down, towards the camera.
_HEAD_POINTS = np.array(
    [[-1, 0, 0], [1, 0, 0], [0, 1.1, 1.0], [-0.83, 2.3, 0.25], [0.83, 2.3, 0.25]],
    dtype=np.float64,
)
# dlib embeddings lie about sqrt(0.387) from the mean face's: strangers sqrt(2 * 0.387) apart, on average.
_DLIB_SQUARED_RADIUS = 0.387


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceLimits:
    """What a photo's face must reach, calibrated on real photos.

    `min_face_px`: shorter side of the face box, photo pixels. `min_sharpness`, `max_yaw_degrees`: see FaceQuality.
    """

    min_face_px: float = 48
    min_sharpness: float = 0.01
    max_yaw_degrees: float = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceQuality:
    """How good a photo's face is: `detection_score` 0..1, `face_px` the box's shorter side in photo pixels.

    `sharpness` is the variance of the Laplacian over the variance of the 112 px crop's luma, so that neither photo size
    nor contrast counts. `yaw_degrees` is estimated from the five points; positive looks to the right of the picture.
    """

    detection_score: float
    face_px: float
    sharpness: float
    yaw_degrees: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Identity:
    """One person's face as the model takes it in.

    `face_image` uint8 (512, 512, 3) RGB, aligned, black where it is neither face nor hair; `embedding` float32 (width,)
    as the recogniser gives it, not normalised; `box` left, top, right, bottom and `landmarks` float32 (5, 2), eyes,
    nose, mouth corners, in photo pixels; `pack` the name of the nets that made it.
    """

    face_image: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    box: tuple[float, float, float, float]
    landmarks: NDArray[np.float32]
    quality: FaceQuality
    photo_sha256: str
    pack: str

    def to_bytes(self) -> bytes:
        """Return the identity as one safetensors file, under 1 MB."""
        tensors: dict[str, NDArray[Any]] = {
            "face_image": self.face_image,
            "embedding": self.embedding,
            "landmarks": self.landmarks,
        }
        facts = {
            "box": self.box,
            "quality": asdict(self.quality),
            "photo_sha256": self.photo_sha256,
            "pack": self.pack,
        }
        return safetensors.numpy.save(tensors, metadata={"identity": json.dumps(facts)})

    @staticmethod
    def from_bytes(data: bytes) -> Identity:
        """Return the identity that `to_bytes` wrote."""
        tensors = safetensors.numpy.load(data)
        # safetensors reads metadata from files only: 8 bytes of length, then the header as JSON.
        header_length = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + header_length])["__metadata__"]["identity"])
        return Identity(
            face_image=tensors["face_image"],
            embedding=tensors["embedding"],
            landmarks=tensors["landmarks"],
            box=tuple(facts["box"]),
            quality=FaceQuality(**facts["quality"]),
            photo_sha256=facts["photo_sha256"],
            pack=facts["pack"],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrameFace:
    """One face of a frame: `embedding` float32 (width,), `box` left, top, right, bottom, `landmarks` float32 (5, 2).

    Box and landmarks (eyes, nose, mouth corners) are in pixels, `score` is the detector's, 0 to 1.
    """

    embedding: NDArray[np.float32]
    box: tuple[float, float, float, float]
    landmarks: NDArray[np.float32]
    score: float

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height of the box in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceScore:
    """How much a video shows the identity: mean `similarity` -1..1 over frames with a face, and their share 0..1."""

    similarity: float
    detection_rate: float


class FaceAnalyzer:
    """Makes identities from photos and judges frames against them with one pack of nets."""

    def __init__(self, pack: FacePack, limits: FaceLimits | None = None) -> None:
        self.pack = pack
        self.limits = limits or FaceLimits()

    def analyze(self, photo: bytes, *, policy: FacePolicy = "largest") -> Identity:
        """Return the identity of the photo's largest face.

        Raises PhotoRefusedError with the code `not_an_image`, `too_large`, `too_small` (photo or face), `no_face`,
        `several_faces` (`policy` "reject": another face is large enough to be meant), `face_turned` or `blurred`.
        """
        check_choice("policy", policy, FacePolicy)
        pixels = decode_photo(photo)
        reduced = _reduced(pixels)
        boxes, points = self.pack.detector.detect(np.ascontiguousarray(reduced[:, :, ::-1]))
        to_photo = np.array(pixels.shape[1::-1], dtype=np.float32) / np.array(reduced.shape[1::-1], dtype=np.float32)
        sides = (boxes[:, 2:4] - boxes[:, :2]) * to_photo
        face_px = sides.min(axis=1)
        self._check_count(face_px, policy)

        chosen = int(sides.prod(axis=1).argmax())
        crop = recognition_crop(reduced, points[chosen])
        quality = self._checked_quality(crop, points[chosen], float(boxes[chosen, 4]), float(face_px[chosen]))
        return Identity(
            face_image=self._masked(reduced, points[chosen]),
            embedding=self._embed([crop])[0],
            box=_box(boxes[chosen, :4] * np.tile(to_photo, 2)),
            landmarks=points[chosen] * to_photo,
            quality=quality,
            photo_sha256=hashlib.sha256(photo).hexdigest(),
            pack=self.pack.name,
        )

    def identify(self, frame: NDArray[np.uint8], face: FrameFace, photo_sha256: str) -> Identity:
        """Return the identity of a face that `find_faces` found in an RGB frame (H, W, 3).

        Raises PhotoRefusedError `too_small`, `face_turned` or `blurred`, as `analyze` does for a photo.
        """
        crop = recognition_crop(frame, face.landmarks)
        return Identity(
            face_image=self._masked(frame, face.landmarks),
            embedding=face.embedding,
            box=face.box,
            landmarks=face.landmarks,
            quality=self._checked_quality(crop, face.landmarks, face.score, min(face.sides)),
            photo_sha256=photo_sha256,
            pack=self.pack.name,
        )

    def analyze_frames(self, frames: NDArray[np.uint8]) -> list[FrameFace | None]:
        """Return the largest face of each RGB frame of (F, H, W, 3), None where there is none."""
        return [next(iter(faces), None) for faces in self._frame_faces(frames, 1)]

    def find_faces(self, frames: NDArray[np.uint8]) -> list[tuple[FrameFace, ...]]:
        """Return all faces of each RGB frame of (F, H, W, 3), largest first."""
        return self._frame_faces(frames, None)

    def _frame_faces(self, frames: NDArray[np.uint8], most: int | None) -> list[tuple[FrameFace, ...]]:
        """Return up to `most` of each frame's faces, largest first."""
        assert frames.ndim == 4
        assert frames.dtype == np.uint8
        crops: list[NDArray[np.uint8]] = []
        found: list[list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = []
        for frame, (boxes, points) in zip(frames, self._detect_frames(frames), strict=True):
            largest = np.argsort(-(boxes[:, 2:4] - boxes[:, :2]).prod(axis=1), kind="stable")[:most]
            found.append([(boxes[at], points[at]) for at in largest])
            crops += [recognition_crop(frame, points[at]) for at in largest]
        embeddings = iter(self._embed(crops)) if crops else iter(())
        return [
            tuple(
                FrameFace(embedding=next(embeddings), box=_box(box[:4]), landmarks=points, score=float(box[4]))
                for box, points in faces
            )
            for faces in found
        ]

    def _detect_frames(self, frames: NDArray[np.uint8]) -> list[Detections]:
        if isinstance(self.pack.detector, MtcnnDetector):
            return self.pack.detector.detect_batch(frames)
        return [self.pack.detector.detect(np.ascontiguousarray(frame[:, :, ::-1])) for frame in frames]

    def _embed(self, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return (N, width) embeddings of RGB 112 px crops."""
        embeddings: NDArray[np.float32] = self.pack.recogniser.get_feat([crop[:, :, ::-1] for crop in crops])
        return embeddings

    def _check_count(self, face_px: NDArray[np.float32], policy: FacePolicy) -> None:
        if len(face_px) == 0:
            raise PhotoRefusedError(
                "no face was found in the photo; use one that shows the face from the front, unobstructed",
                code="no_face",
                numbers={"faces": 0},
            )
        usable = int((face_px >= self.limits.min_face_px).sum())
        if policy == "reject" and usable > 1:
            raise PhotoRefusedError(
                f"the photo shows {usable} faces and it must be clear who is meant; crop it to one person",
                code="several_faces",
                numbers={"faces": usable},
            )

    def _masked(self, image: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.uint8]:
        aligned = align_face(image, points)
        return aligned * self.pack.parser.mask(aligned)[:, :, None]

    def _checked_quality(
        self, crop: NDArray[np.uint8], points: NDArray[np.float32], score: float, face_px: float
    ) -> FaceQuality:
        if face_px < self.limits.min_face_px:
            raise PhotoRefusedError(
                f"the face is {face_px:.0f} px wide; {self.limits.min_face_px:.0f} are needed. "
                "Use a larger photo or crop closer before scaling down",
                code="too_small",
                numbers={
                    "face_px": face_px,
                    "min_face_px": self.limits.min_face_px,
                },
            )
        quality = FaceQuality(
            detection_score=score, face_px=face_px, sharpness=sharpness(crop), yaw_degrees=yaw_degrees(points)
        )
        if abs(quality.yaw_degrees) > self.limits.max_yaw_degrees:
            raise PhotoRefusedError(
                f"the face is turned about {abs(quality.yaw_degrees):.0f} degrees away; at most "
                f"{self.limits.max_yaw_degrees:.0f} are allowed. Use a photo taken more from the front",
                code="face_turned",
                numbers={
                    "yaw_degrees": quality.yaw_degrees,
                    "max_yaw_degrees": self.limits.max_yaw_degrees,
                },
            )
        if quality.sharpness < self.limits.min_sharpness:
            raise PhotoRefusedError(
                f"the face is blurred: sharpness {quality.sharpness:.3f}, {self.limits.min_sharpness:.3f} is needed. "
                "Use a sharper photo",
                code="blurred",
                numbers={
                    "sharpness": quality.sharpness,
                    "min_sharpness": self.limits.min_sharpness,
                },
            )
        return quality


def compare(identity: Identity, faces: Sequence[FrameFace | None]) -> FaceScore:
    """Return how much the frames' faces, found by the identity's own pack, look like the identity.

    Frames without a face count in `detection_rate` alone; with no face at all the similarity is 0, a stranger's.
    """
    return face_score(identity.pack, identity.embedding, faces)


def face_score(pack: str, embedding: NDArray[np.float32], faces: Sequence[FrameFace | None]) -> FaceScore:
    """Return how much the frames' faces look like a face of that embedding; see `compare`."""
    found = [similarity(pack, embedding, face.embedding) for face in faces if face is not None]
    return FaceScore(
        similarity=float(np.mean(found)) if found else 0.0,
        detection_rate=len(found) / len(faces) if faces else 0.0,
    )


def similarity(pack: str, first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return how alike the pack calls two embeddings: 1 the same face, about 0 strangers, at least -1.

    antelopev2: the cosine, as published. dlib: embeddings lie far from the origin, so that strangers' cosine is .81;
    1 - d^2 / (2 r^2) of the L2 distance d is the cosine seen from the mean face, r being the usual distance from it.
    dlib's own threshold, d = 0.6, is 0.535 here.
    """
    if pack.startswith(EMBEDDED_KIND):
        squared_distance = float(((first - second) ** 2).sum())
        return max(-1.0, 1 - squared_distance / (2 * _DLIB_SQUARED_RADIUS))
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def alignment(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the similarity (2, 3) from an image's pixels to the aligned face's, from five points (5, 2)."""
    matrix, _ = cv2.estimateAffinePartial2D(points, np.array(ALIGNED_POINTS, dtype=np.float32), method=cv2.LMEDS)
    return np.asarray(matrix, dtype=np.float64)


def align_face(image: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the (512, 512, 3) face that the similarity from five points (5, 2) cuts from an (H, W, 3) RGB image."""
    aligned = cv2.warpAffine(
        image,
        alignment(points),
        (FACE_SIDE, FACE_SIDE),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_OUTSIDE,
    )
    return np.asarray(aligned, dtype=np.uint8)


def recognition_crop(image: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the (112, 112, 3) crop that ArcFace nets take, by insightface's own alignment."""
    with warnings.catch_warnings():
        # insightface 2.1 calls a scikit-image method that 0.26 announces to rename.
        warnings.filterwarnings("ignore", "`estimate` is deprecated", FutureWarning)
        crop: NDArray[np.uint8] = norm_crop(image, points, RECOGNITION_SIDE)
    return crop


def sharpness(crop: NDArray[np.uint8]) -> float:
    """Return FaceQuality's sharpness of a recognition crop (112, 112, 3) RGB."""
    luma = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(luma, cv2.CV_32F).var() / max(float(luma.var()), 1.0))


def yaw_degrees(points: NDArray[np.float32]) -> float:
    """Return the head's turn from its five points (5, 2): scaled-orthographic pose of a generic head.

    One step of POSIT (DeMenthon and Davis 1995), which leaves out perspective: good to about 15 degrees.
    """
    head = _HEAD_POINTS - _HEAD_POINTS.mean(axis=0)
    seen = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    right, down = np.linalg.lstsq(head, seen, rcond=None)[0].T
    towards_camera = np.cross(right / np.linalg.norm(right), down / np.linalg.norm(down))
    return math.degrees(math.atan2(-towards_camera[0], towards_camera[2]))


def _reduced(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the image with its longer side at most 1024 px, by the published resampling."""
    height, width = image.shape[:2]
    scale = MAX_DETECTION_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LANCZOS4), dtype=np.uint8)


def _box(corners: NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(corner) for corner in corners)
    return left, top, right, bottom
