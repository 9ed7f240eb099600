"""The nets of the face step: which files make a pack, and loading them once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from insightface.app import FaceAnalysis
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from numpy.typing import NDArray

from echovideo.errors import RunError, WeightsError
from echovideo.faces.mtcnn import Detections, MtcnnDetector
from echovideo.faces.parsing import BiSeNetParser, FaceParser, MeshParser

EMBEDDED_KIND = "dlib"
PRODUCTION_KIND = "antelopev2"

_EMBEDDED_RECOGNISER = "recogniser.onnx"
_PRODUCTION_FOLDER = Path("models") / "antelopev2"
_PRODUCTION_DETECTOR = _PRODUCTION_FOLDER / "scrfd_10g_bnkps.onnx"
_PRODUCTION_RECOGNISER = _PRODUCTION_FOLDER / "glintr100.onnx"
_PRODUCTION_PARSER = "parsing_bisenet.pth"
_PRODUCTION_DETECTION_SIZE = (640, 640)


class FaceDetector(Protocol):
    """What insightface's SCRFD class and MtcnnDetector have in common."""

    def detect(self, img: NDArray[np.uint8]) -> Detections:
        """Return boxes (N, 5) with scores and points (N, 5, 2) of a BGR image (H, W, 3), in its pixels."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FacePack:
    """Three loaded nets and their name, `<kind>-<digest of their files>`, which changes whenever an identity could."""

    name: str
    detector: FaceDetector
    recogniser: ArcFaceONNX
    parser: FaceParser


def open_pack(folder: Path) -> FacePack:
    """Load a `face_encoder` folder, published or embedded by its content; raises WeightsError naming a missing file."""
    if (folder / _PRODUCTION_FOLDER).is_dir():
        return production_pack(folder)
    if (folder / _EMBEDDED_RECOGNISER).is_file():
        return embedded_pack(folder)
    raise WeightsError(
        f"no face nets in {folder}: neither {_PRODUCTION_FOLDER}/ (published) nor {_EMBEDDED_RECOGNISER} (embedded)"
    )


def pack_name(folder: Path) -> str:
    """Return the name of the pack that `open_pack` would load, without loading it; raises WeightsError as it does."""
    if (folder / _PRODUCTION_FOLDER).is_dir():
        return _digest_name(PRODUCTION_KIND, _production_files(folder))
    return _digest_name(EMBEDDED_KIND, _embedded_files(folder))


def embedded_pack(folder: Path) -> FacePack:
    """Load the embedded nets on CPU: MTCNN, `folder`/recogniser.onnx (see export_recogniser) and the mesh parser."""
    files = _embedded_files(folder)
    recogniser = files[0]
    session = onnxruntime.InferenceSession(str(recogniser), providers=["CPUExecutionProvider"])
    return FacePack(
        name=_digest_name(EMBEDDED_KIND, files),
        detector=MtcnnDetector(),
        recogniser=ArcFaceONNX(str(recogniser), session),
        parser=MeshParser(),
    )


def production_pack(folder: Path) -> FacePack:
    """Load the published nets: insightface's antelopev2 (SCRFD at 640 px, glintr100) and BiSeNet.

    They run on CUDA where onnxruntime (detector, recogniser) or torch (parser) was installed with it, else on CPU.
    Raises WeightsError naming a missing file, RunError if onnxruntime's CUDA does not start.
    """
    files = _production_files(folder)
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    analysis = FaceAnalysis(
        name=str(folder / _PRODUCTION_FOLDER),
        allowed_modules=["detection", "recognition"],
        providers=["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"],
    )
    analysis.prepare(ctx_id=0 if cuda else -1, det_size=_PRODUCTION_DETECTION_SIZE)
    recogniser = analysis.models.get("recognition")
    if not isinstance(recogniser, ArcFaceONNX):
        raise WeightsError(f"{folder / _PRODUCTION_RECOGNISER} is not a face recogniser")
    if cuda and "CUDAExecutionProvider" not in recogniser.session.get_providers():
        raise RunError(
            "onnxruntime lists CUDA but cannot start it; check its CUDA libraries",
            code="accelerator",
        )
    return FacePack(
        name=_digest_name(PRODUCTION_KIND, files),
        detector=analysis.det_model,
        recogniser=recogniser,
        parser=BiSeNetParser(folder / _PRODUCTION_PARSER, "cuda" if torch.cuda.is_available() else "cpu"),
    )


def _embedded_files(folder: Path) -> list[Path]:
    weights = Path(__file__).parent / "weights"
    shipped = sorted([*weights.glob("*.safetensors"), *weights.glob("*.tflite")])
    assert len(shipped) == 3
    return _checked([folder / _EMBEDDED_RECOGNISER, *shipped])


def _production_files(folder: Path) -> list[Path]:
    return _checked([folder / name for name in (_PRODUCTION_DETECTOR, _PRODUCTION_RECOGNISER, _PRODUCTION_PARSER)])


def _checked(paths: list[Path]) -> list[Path]:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise WeightsError(f"face nets missing: {', '.join(missing)}")
    return paths


def _digest_name(kind: str, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{kind}-{digest.hexdigest()[:16]}"
