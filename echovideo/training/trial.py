"""How much fixed prompts' videos show a person: while the person is learnt, then with the adapter and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.conditioning import Condition, encode_prompt, fuse_condition
from echovideo.engine import Engine, model_dtype, to_uint8
from echovideo.faces.analyzer import FaceAnalyzer, FaceScore, face_score
from echovideo.faces.packs import open_pack
from echovideo.model.config import TransformerConfig, read_config
from echovideo.model.folder import load_scheduler, load_text_encoder, load_tokenizer, load_vae, vae_dtype
from echovideo.request import RenderRequest
from echovideo.sampler import decode
from echovideo.settings import EngineSettings
from echovideo.training.adapters import Adapter
from echovideo.training.dataset import Dataset, Example, open_dataset

if TYPE_CHECKING:
    from echovideo.model.transformer import EchoVideoTransformer3DModel

PROMPTS = (
    "A person talks to the camera in a bright room.",
    "A person smiles in a park.",
)
VALIDATION_PROMPTS = PROMPTS[:1]
VALIDATION_STEPS = 10
MAX_REFERENCES = 2
SEED = 42
_SHOWN_FRAMES = 4
_TILE = 160


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrialVideo:
    """One video of a trial, with or without the adapter, made with the first reference of clip `clip_id`.

    `score` compares it with a reference from another recording of the person, which the model was not given: a copied
    picture gains little. `reference_HWC` is the face that the model was given, `frames_FHWC` a few frames of the video,
    uint8 RGB.
    """

    clip_id: str
    prompt: str
    adapted: bool
    score: FaceScore
    reference_HWC: NDArray[np.uint8]  # noqa: N815
    frames_FHWC: NDArray[np.uint8]  # noqa: N815


def try_adapter(
    model: Path, dataset: Dataset, adapter: Adapter, base_digest: str, settings: EngineSettings, *, steps: int
) -> list[TrialVideo]:
    """Render every prompt with the first reference of the first clips of a dataset, without and with the adapter.

    Videos have the clip's own size and length, and one seed. `model` is the base's folder, `base_digest` its digest,
    `steps` the denoising steps of a video. Raises WeightsError, DatasetError.
    """
    texts = prompt_states(model, PROMPTS, settings)
    engine = Engine.open(model, settings)
    analyzer = FaceAnalyzer(open_pack(model / "face_encoder"))
    videos = _videos(engine, analyzer, dataset, texts, adapted=False, steps=steps)
    engine.adapter.hold("trial", lambda: adapter, base_digest)
    return videos + _videos(engine, analyzer, dataset, texts, adapted=True, steps=steps)


def validation_scores(
    transformer: EchoVideoTransformer3DModel,
    steps: int,
    *,
    model: Path,
    dataset: Path,
    texts: Mapping[str, torch.Tensor],
    settings: EngineSettings,
) -> dict[str, float]:
    """Return the scores of a transformer after `steps` steps of training, which is left as it was.

    It may carry an adapter's layers. The videos are `try_adapter`'s, of the prompts of `texts` and in VALIDATION_STEPS
    denoising steps: the prompts are nobody's captions, the noise is always the same. "similarity" and "detection_rate"
    are `mean_score`'s and "score" is their product, so a face in half of the frames counts half. VAE and face nets are
    read from the folder `model` each time, so that nothing of them stays beside the training. Raises WeightsError,
    DatasetError.
    """
    # The engine pins the number of threads, and the training's sums depend on it.
    threads = torch.get_num_threads()
    vae = load_vae(model, dtype=vae_dtype(model_dtype(settings))).to(settings.device)
    engine = Engine(transformer, vae, load_scheduler(model), settings)
    analyzer = FaceAnalyzer(open_pack(model / "face_encoder"))
    try:
        videos = _videos(engine, analyzer, open_dataset(dataset), texts, adapted=True, steps=VALIDATION_STEPS)
    finally:
        torch.set_num_threads(threads)
    mean = mean_score(videos, adapted=True)
    return {"score": mean.similarity * mean.detection_rate, **asdict(mean)}


def prompt_states(model: Path, prompts: Sequence[str], settings: EngineSettings) -> dict[str, torch.Tensor]:
    """Return T5's states (1, 226, text_dim) by prompt, on the CPU; the encoder, the model's largest part, is gone then.

    Raises WeightsError.
    """
    tokenizer = load_tokenizer(model)
    length = TransformerConfig.from_dict(read_config(model / "transformer")).max_text_seq_length
    encoder = load_text_encoder(model, dtype=model_dtype(settings)).to(settings.device)
    states = {prompt: encode_prompt(tokenizer, encoder, prompt, length).cpu() for prompt in prompts}
    del encoder
    # Another process of the same device, a worker, cannot use what this one keeps for later.
    torch.cuda.empty_cache()
    return states


@torch.inference_mode()
def _videos(
    engine: Engine,
    analyzer: FaceAnalyzer,
    dataset: Dataset,
    texts: Mapping[str, torch.Tensor],
    *,
    adapted: bool,
    steps: int,
) -> list[TrialVideo]:
    null = dataset.null()
    videos = []
    for example in sorted(dataset.examples, key=lambda example: example.clip_id)[:MAX_REFERENCES]:
        given, other = (
            dataset.reference_tensors(references[0], example.height, example.width)
            for references in (dataset.in_clip(example), dataset.cross_clip(example))
        )
        mean, std = (tensor.float() for tensor in given.posteriors[example.height, example.width])
        scale = float(engine.vae.config.scaling_factor)
        shown = to_uint8(decode(engine.vae, mean[None, None] * scale))[0]
        for prompt, states in texts.items():
            condition = Condition(
                fused_2ND=fuse_condition(
                    engine.transformer,
                    prompt_embeds=states,
                    negative_prompt_embeds=null.text_ND[None],
                    face_tokens=given.tokens_ND[None],
                    empty_face_tokens=null.tokens_ND[None],
                    face_embedding=given.embedding_D[None],
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
                    score=face_score(analyzer.pack.name, other.embedding_D.numpy(), faces),
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
