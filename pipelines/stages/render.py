"""Render stage: condition in, committed video out; denoise, decode, encode, judge and re-seed inside one actor.

One row holds the GPU at a time; while it denoises, the row before it is encoded, judged and stored on the CPU.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from echovideo.conditioning import Condition
from echovideo.engine import Engine, KeepGoing, Rendered
from echovideo.faces.analyzer import FaceAnalyzer, FaceScore, Identity, compare
from echovideo.faces.packs import open_pack
from echovideo.provenance import container_metadata, sidecar_basis
from echovideo.request import RenderRequest
from echovideo.settings import derived_seeds, video_key
from echovideo.training.adapters import AdapterSlot
from echovideo.video import Video, encode_mp4, first_frame
from pipelines.config import RunConfig
from pipelines.ledger import Claim, StoredVideo
from pipelines.outcome import Ok, Rejected, RowOutcome
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage, identity_of, put_identity
from pipelines.storage import StoragePath


class Renderer(Protocol):
    """What the stage asks of an engine; see Engine."""

    @property
    def adapter(self) -> AdapterSlot:
        """Where a row's adapter goes; only rows that name one, and those after them, need it."""

    def render(self, condition: Condition, request: RenderRequest, seed: int, keep_going: KeepGoing) -> Rendered:
        """Return the request's frames for `seed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """One seed's video: its file, how it scored (None where faces are not judged) and seconds by part of the work."""

    seed: int
    video: Video
    score: FaceScore | None
    timings: Mapping[str, float]

    @property
    def rank(self) -> tuple[float, float]:
        """Best take last: by similarity, then by detection rate."""
        return (self.score.similarity, self.score.detection_rate) if self.score else (0.0, 0.0)


class RenderStage(Stage):
    """Holds the engine. Subclasses may open another renderer; `watch` is told of each step and may stop the row."""

    name = "render"
    calls_at_once = 2

    def __init__(self, config: RunConfig, epoch: int) -> None:
        super().__init__(config, epoch)
        self.renderer = self.open_renderer()
        # Faces that nobody can tell apart are not judged.
        self.analyzer = FaceAnalyzer(open_pack(Path(config.model) / "face_encoder")) if config.card.judged else None
        self._gpu = threading.Lock()
        self._analyzing = threading.Lock()
        self.watch: KeepGoing = _unwatched

    def open_renderer(self) -> Renderer:
        """Load the engine of the run's model."""
        return Engine.open(Path(self.config.model), self.config.engine)

    def work(self, row: Row, claim: Claim) -> Row:
        """Return the row ended with the video that its key already names, or with one rendered now."""
        assert row.condition is not None
        assert row.identity is not None
        request, identity = row.request, Identity.from_bytes(row.identity)
        key = video_key(
            request,
            photo_sha256=identity.photo_sha256,
            face_nets=identity.pack,
            model_digest=self.config.model_digest,
            settings=self.config.engine,
            adapter_sha256=self._adapter_sha256(request),
        )
        stored = self.ledger.find_video(key)
        reused = stored is not None
        if stored is None:
            with tempfile.TemporaryDirectory(prefix="echovideo-") as folder:
                takes = self._takes(row, identity, Path(folder))
                best = max(takes, key=lambda take: take.rank)
                stored = self.ledger.put_video(
                    key, Path(best.video.uri), self._sidecar(row, identity, key, takes, best)
                )
                poster = first_frame(Path(best.video.uri))
        else:
            poster = first_frame(StoragePath.parse(stored.uri, self.config.storage).read_bytes())
        self.keep_picture("posters", row, poster)
        return row.ended(_outcome(row, stored, claim, reused=reused))

    def _takes(self, row: Row, identity: Identity, folder: Path) -> list[Take]:
        """Render seed after seed until one reaches the gate, or all tries are spent."""
        assert row.condition is not None
        request, condition = row.request, Condition.from_bytes(row.condition)
        gate = request.face_similarity if self.analyzer is not None else None
        takes: list[Take] = []
        for seed in derived_seeds(request.seed, request.tries if gate is not None else 1):
            with self._gpu:
                put_identity(self.renderer.adapter, self.config, request)
                rendered = self.renderer.render(condition, request, seed, self._keep_going)
            started = time.perf_counter()
            video = encode_mp4(
                rendered.frames_FHWC,
                folder / f"{seed}.mp4",
                fps=request.fps,
                metadata=container_metadata(
                    request, self.config.card, seed=seed, adapter_sha256=self._adapter_sha256(request)
                ),
            )
            encoded = time.perf_counter()
            score = self._score(identity, rendered.frames_FHWC)
            timings = {
                **rendered.timings,
                "encode": encoded - started,
                **({} if score is None else {"judge": time.perf_counter() - encoded}),
            }
            takes.append(Take(seed=seed, video=video, score=score, timings=timings))
            if gate is None or (score is not None and score.similarity >= gate):
                break
        return takes

    def _adapter_sha256(self, request: RenderRequest) -> str | None:
        card = identity_of(self.config, request)
        return card.sha256 if card else None

    def _keep_going(self, step: int, steps: int, draw: Callable[[], bytes]) -> bool:
        return self.watch(step, steps, draw) and not self.cancelled()

    def _score(self, identity: Identity, frames_FHWC: np.ndarray[Any, Any]) -> FaceScore | None:
        if self.analyzer is None:
            return None
        with self._analyzing:
            return compare(identity, self.analyzer.analyze_frames(frames_FHWC))

    def _sidecar(self, row: Row, identity: Identity, key: str, takes: list[Take], best: Take) -> dict[str, Any]:
        config, request = self.config, row.request
        card = identity_of(config, request)
        basis = sidecar_basis(request, config.card, config.engine, photo_sha256=identity.photo_sha256)
        return {
            **basis,
            "model": {**basis["model"], "digest": config.model_digest, "face_nets": identity.pack},
            **({"identity_lora": asdict(card)} if card else {}),
            "video_key": key,
            "first_made_for": {"run_id": config.run_id, "row_id": request.row_id},
            "video": {name: value for name, value in asdict(best.video).items() if name != "uri"},
            "seed": best.seed,
            "takes": [
                {
                    "seed": take.seed,
                    "face_similarity": take.score.similarity if take.score else None,
                    "detection_rate": take.score.detection_rate if take.score else None,
                    "timings_s": dict(take.timings),
                }
                for take in takes
            ],
            "face_judged": "yes" if config.card.judged else "no: the model's faces cannot be told apart",
        }


def _unwatched(step: int, steps: int, draw: Callable[[], bytes]) -> bool:
    return True


def _outcome(row: Row, stored: StoredVideo, claim: Claim, *, reused: bool) -> RowOutcome:
    """Return the outcome that a stored video, new or found, is for a row."""
    request, sidecar = row.request, stored.sidecar
    video = Video(uri=stored.uri, **sidecar["video"])
    take = next(take for take in sidecar["takes"] if take["seed"] == sidecar["seed"])
    similarity, gate = take["face_similarity"], request.face_similarity
    if gate is not None and similarity is not None and similarity < gate:
        return Rejected(
            row_id=request.row_id,
            code="face_similarity",
            message=(
                f"the best of {len(sidecar['takes'])} takes looks {similarity:.3f} like the photo; "
                f"{gate:.3f} was asked for. The best take was kept"
            ),
            numbers={"face_similarity": similarity, "threshold": gate, "takes": len(sidecar["takes"])},
            video=video,
            sidecar_uri=stored.sidecar_uri,
        )
    totals = dict(row.timings)
    for each in () if reused else sidecar["takes"]:
        for part, seconds in each["timings_s"].items():
            totals[part] = totals.get(part, 0.0) + seconds
    return Ok(
        row_id=request.row_id,
        attempt=claim.attempt,
        video=video,
        sidecar_uri=stored.sidecar_uri,
        seed=sidecar["seed"],
        seeds_tried=tuple(each["seed"] for each in sidecar["takes"]),
        face_similarity=similarity,
        detection_rate=take["detection_rate"],
        timings=totals,
        reused=reused,
    )
