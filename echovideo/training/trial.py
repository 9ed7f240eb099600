"""What an adapter changes: fixed prompts rendered with it and without it, and how much each video shows the person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.conditioning import Condition, encode_prompt, fuse_condition
from echovideo.engine import Engine, model_dtype, to_uint8
from echovideo.faces.analyzer import FaceAnalyzer, FaceScore, face_score
from echovideo.faces.packs import open_pack
from echovideo.model.config import TransformerConfig
from echovideo.model.folder import load_text_encoder, load_tokenizer
from echovideo.model.weights import read_config
from echovideo.request import RenderRequest
from echovideo.sampler import decode
from echovideo.settings import EngineSettings
from echovideo.training.adapters import Adapter
from echovideo.training.dataset import Dataset, Example

PROMPTS = (
    "A person talks to the camera in a bright room.",
    "A person smiles in a park.",
)
MAX_REFERENCES = 2
SEED = 42
_SHOWN_FRAMES = 4
_TILE = 160


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrialVideo:
    """One video of a trial, with or without the adapter; `score` compares it with the reference of clip `clip_id`.

    `reference_HWC` is the face that the model was given, `frames_FHWC` a few frames of the video, uint8 RGB.
    """

    clip_id: str
    prompt: str
    adapted: bool
    score: FaceScore
    reference_HWC: NDArray[np.uint8]  # noqa: N815
    frames_FHWC: NDArray[np.uint8]  # noqa: N815


@torch.inference_mode()
def try_adapter(
    model: Path, dataset: Dataset, adapter: Adapter, base_digest: str, settings: EngineSettings, *, steps: int
) -> list[TrialVideo]:
    """Render every prompt with the first reference of the first clips of a dataset, without and with the adapter.

    Videos have the clip's own size and length, and one seed. `model` is the base's folder, `base_digest` its digest,
    `steps` the denoising steps of a video. Raises WeightsError, DatasetError.
    """
    texts = _texts(model, ("", *PROMPTS), settings)
    engine = Engine.open(model, settings)
    analyzer = FaceAnalyzer(open_pack(model / "face_encoder"))
    null = dataset.null()
    videos: list[TrialVideo] = []
    for adapted in (False, True):
        if adapted:
            engine.adapter.hold("trial", lambda: adapter, base_digest)
        for example in _clips(dataset):
            reference = dataset.in_clip(example)[0]
            face = dataset.reference_tensors(reference, example.height, example.width)
            mean, std = (tensor.float() for tensor in face.posteriors[example.height, example.width])
            scale = float(engine.vae.config.scaling_factor)
            shown = to_uint8(decode(engine.vae, mean[None, None] * scale))[0]
            for prompt in PROMPTS:
                condition = Condition(
                    fused_2ND=fuse_condition(
                        engine.transformer,
                        prompt_embeds=texts[prompt],
                        negative_prompt_embeds=texts[""],
                        face_tokens=face.tokens_ND[None],
                        empty_face_tokens=null.tokens_ND[None],
                        face_embedding=face.embedding_D[None],
                    ),
                    face_mean_CHW=mean,
                    face_std_CHW=std,
                )
                frames = engine.render(condition, _request(example, prompt, steps), SEED, _always).frames_FHWC
                faces = analyzer.analyze_frames(frames)
                chosen = np.linspace(0, len(frames) - 1, _SHOWN_FRAMES).round().astype(int)
                videos.append(
                    TrialVideo(
                        clip_id=example.clip_id,
                        prompt=prompt,
                        adapted=adapted,
                        score=face_score(analyzer.pack.name, face.embedding_D.numpy(), faces),
                        reference_HWC=shown,
                        frames_FHWC=frames[chosen],
                    )
                )
    return videos


def mean_score(videos: Sequence[TrialVideo], *, adapted: bool) -> FaceScore:
    """Return the means over the videos with the adapter, or without it; similarity is over those with a face."""
    scores = [video.score for video in videos if video.adapted == adapted]
    similarities = [score.similarity for score in scores if score.detection_rate > 0]
    return FaceScore(
        similarity=float(np.mean(similarities)) if similarities else 0.0,
        detection_rate=float(np.mean([score.detection_rate for score in scores])),
    )


def trial_sheet(videos: Sequence[TrialVideo]) -> Image.Image:
    """Return one picture: a line per reference and prompt, the reference, then frames without and with the adapter."""
    without, adapted = ([video for video in videos if video.adapted == kind] for kind in (False, True))
    width = (1 + 2 * _SHOWN_FRAMES) * _TILE
    lines = [
        [before.reference_HWC, *before.frames_FHWC, *after.frames_FHWC]
        for before, after in zip(without, adapted, strict=True)
    ]
    sheet = Image.new("RGB", (width, len(lines) * _TILE), "white")
    for row, line in enumerate(lines):
        for column, pixels in enumerate(line):
            tile = Image.fromarray(pixels)
            tile.thumbnail((_TILE - 2, _TILE - 2))
            sheet.paste(tile, (column * _TILE, row * _TILE))
    return sheet


def _texts(model: Path, prompts: Sequence[str], settings: EngineSettings) -> dict[str, torch.Tensor]:
    """Return T5's states by prompt; the encoder, the largest part of the model, is gone before the others load."""
    tokenizer = load_tokenizer(model)
    length = TransformerConfig.from_dict(read_config(model / "transformer")).max_text_seq_length
    encoder = load_text_encoder(model, dtype=model_dtype(settings)).to(settings.device)
    return {prompt: encode_prompt(tokenizer, encoder, prompt, length) for prompt in prompts}


def _clips(dataset: Dataset) -> list[Example]:
    return sorted(dataset.examples, key=lambda example: example.clip_id)[:MAX_REFERENCES]


def _request(example: Example, prompt: str, steps: int) -> RenderRequest:
    return RenderRequest(
        row_id="trial",
        prompt=prompt,
        photo_bytes=b"",
        height=example.height,
        width=example.width,
        num_frames=example.num_frames,
        num_inference_steps=steps,
    )


def _always(step: int, steps: int, draw: Any) -> bool:
    return True
