"""One video in this process: photo and prompt in, MP4 and its sidecar out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from echovideo.engine import check_device, model_dtype, to_uint8
from echovideo.model.card import read_card
from echovideo.pipeline import EchoVideoPipeline
from echovideo.provenance import container_metadata, sidecar_basis
from echovideo.request import RenderRequest
from echovideo.settings import EngineSettings, check_tier
from echovideo.video import encode_mp4


def render_one(
    request: RenderRequest,
    folder: Path,
    settings: EngineSettings,
    out: Path,
    on_step: Callable[[int], None],
) -> dict[str, Any]:
    """Render the request with the model in `folder` into `out` and return the sidecar written beside it as .json.

    `on_step(steps done)` is called after loading with 0 and then after each step. Raises what the pipeline raises.
    """
    assert request.photo_bytes is not None
    check_tier(request.tier)
    check_device(settings)
    torch.set_num_threads(settings.num_threads)
    card = read_card(folder)
    pipeline = EchoVideoPipeline.from_pretrained(folder, dtype=model_dtype(settings), device=settings.device)
    on_step(0)
    output = pipeline(
        photo=request.photo_bytes,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_schedule=request.guidance_schedule,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
        callback=lambda step, timestep, latents: on_step(step + 1),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    video = encode_mp4(
        to_uint8(output.frames),
        out,
        fps=request.fps,
        metadata=container_metadata(request, card, seed=request.seed),
    )
    sidecar = {
        **sidecar_basis(request, card, settings, photo_sha256=hashlib.sha256(request.photo_bytes).hexdigest()),
        "video": {**asdict(video), "uri": str(out.resolve())},
    }
    out.with_suffix(".json").write_text(json.dumps(sidecar, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return sidecar
