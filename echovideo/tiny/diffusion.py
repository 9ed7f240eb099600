"""Trains the tiny model's transformer on the drawn world: base, stage 1, stage 2; and scores what it makes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from echovideo.evaluation.cases import Case, draw_gallery, draw_reference_photos, draw_truths
from echovideo.evaluation.networks import load_judges
from echovideo.evaluation.scores import expect, look, score
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.synthetic.person import SPLITS
from echovideo.tiny.drawing import draw_photos
from echovideo.tiny.generate import generate
from echovideo.tiny.parts import scheduler, tiny_config
from echovideo.tiny.world import Encoders, Photos, Whitening, World, WorldSource, encode_world
from echovideo.training.initialise import start_as_base
from echovideo.training.loop import train
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import GROUPS, AverageSettings, StageSettings, base, stage_one, stage_two

_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """How the transformer is trained: `people` clips are drawn; the base takes `base_steps`, the stages what is left.

    `seconds` are of all that; stage 1 gets `stage_one_share` of what drawing and the base leave of them.
    """

    seconds: float
    seed: int = 3
    people: int = 24_576
    batch_size: int = 512
    base_steps: int = 900
    stage_one_share: float = 0.45
    learning_rate: float = 8e-4


def train_model(settings: ModelSettings, encoders: Encoders, device: torch.device) -> EchoVideoTransformer3DModel:
    """Return the transformer with averaged weights, bfloat16 on `device`, for raw embeddings."""
    began = time.monotonic()
    generator = torch.Generator(device).manual_seed(settings.seed)
    people = SPLITS["train"][: settings.people]
    world = encode_world(encoders, people, 0, generator, compiled=device.type == "cuda")
    whitening = Whitening.of(world.embedding_NPD)
    torch.manual_seed(settings.seed)
    model = EchoVideoTransformer3DModel(tiny_config()).to(device)
    start_as_base(model)
    whitening.begin(model.face_prj_wofc.proj_in)
    model = model.to(torch.bfloat16)

    drawn = time.monotonic()
    common: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "average": AverageSettings(decay=0.998),
    }
    text = base(steps=settings.base_steps, learning_rate=settings.learning_rate, **common)
    _run(model, text, world, encoders, whitening)
    now = time.monotonic()
    steps = int((settings.seconds - (now - began)) / (now - drawn) * settings.base_steps)
    first = int(steps * settings.stage_one_share)
    # The paper's base knows faces before it learns identities; this small one learns both in stage 1.
    one = stage_one(steps=first, groups=GROUPS, references="cross_clip", learning_rate=settings.learning_rate, **common)
    _run(model, one, world, encoders, whitening)
    two = stage_two(steps=steps - first, learning_rate=settings.learning_rate / 2, **common)
    _run(model, two, world, encoders, whitening)
    whitening.fold(model.face_prj_wofc.proj_in)
    return model.eval().requires_grad_(False)


def _run(
    model: EchoVideoTransformer3DModel,
    settings: StageSettings,
    world: World,
    encoders: Encoders,
    whitening: Whitening,
) -> None:
    schedule = NoiseSchedule.of(scheduler(), encoders.scaling_factor, model.proj_out.weight.device)
    source = WorldSource(world, encoders, whitening, settings)
    progress = train(model, schedule, source, encoders.null(), settings)
    print(f"{settings.name}: {progress}", flush=True)


def case_photos(encoders: Encoders, cases: list[Case], generator: torch.Generator) -> Photos:
    """Return the cases' reference photos, encoded."""
    parts = []
    for start in range(0, len(cases), _CHUNK):
        chunk = cases[start : start + _CHUNK]
        drawing = draw_photos([case.person for case in chunk], [case.reference for case in chunk], generator.device)
        parts.append(encoders.photos(drawing, generator))
    return Photos(
        tokens_BND=torch.cat([part.tokens_BND for part in parts]),
        embedding_BD=torch.cat([part.embedding_BD for part in parts]),
        mean_BCHW=torch.cat([part.mean_BCHW for part in parts]),
        std_BCHW=torch.cat([part.std_BCHW for part in parts]),
    )


@torch.no_grad()
def measure_model(
    transformer: EchoVideoTransformer3DModel, encoders: Encoders, cases: list[Case], out: Path, device: torch.device
) -> Mapping[str, tuple[float, str, float | None]]:
    """Return scores on 300 unseen people, under several guidances, and write the first clips to samples.png."""
    generator = torch.Generator(device).manual_seed(0)
    photos = case_photos(encoders, cases, generator)
    truths, references = draw_truths(cases, str(device)), draw_reference_photos(cases, str(device))
    gallery = draw_gallery([case.person for case in cases], str(device))
    judges = load_judges(device=str(device))

    expected = expect(judges, cases, truths_BFHWC=truths, references_BFHWC=references, gallery_BFHWC=gallery)
    ceiling = look(judges, _through_autoencoder(encoders, truths), expected)

    def scores(clips: Tensor) -> Mapping[str, tuple[float, float | None]]:
        found = score(look(judges, clips, expected), ceiling)
        return {name: (measured.value, measured.ceiling) for name, measured in found.items()}

    prompts = [case.prompt for case in cases]
    found: dict[str, tuple[float, str, float | None]] = {}
    sheet = [references[:8], truths[:8, ::8]]
    for schedule, guidance, strength in (("published", 6.0, 1.0), ("constant", 3.0, 1.0), ("constant", 3.0, 0.0)):
        clips = generate(
            transformer,
            encoders,
            prompts,
            photos,
            generator=generator,
            guidance=guidance,
            guidance_schedule=schedule,  # type: ignore[arg-type]
            face_latent=strength,
        )
        sheet.append(clips[:8, ::8])
        for name, (value, most) in scores(clips).items():
            found[f"{schedule} {guidance:g}, face latent {strength:g}: {name}"] = (value, "", None)
            if most is not None:
                found[f"ceiling: {name}"] = (most, "", None)
    picture = torch.cat(sheet, dim=1).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    Image.fromarray(picture.numpy()).save(out / "samples.png")
    return found


def _through_autoencoder(encoders: Encoders, clips_BFHWC: Tensor) -> Tensor:
    parts = []
    for chunk in clips_BFHWC.split(_CHUNK):
        video = chunk.to(encoders.text_encoder.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        mean = encoders.vae.encode(video.bfloat16()).latent_dist.mean  # type: ignore[operator]
        decoded = encoders.vae.decode(mean).sample.float()  # type: ignore[operator]
        pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
        parts.append(pixels.permute(0, 2, 3, 4, 1).cpu())
    return torch.cat(parts)
