"""The published model's recorded numbers, and the formula that makes their weights and inputs."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from safetensors import safe_open
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from echovideo import EchoVideoPipeline, EchoVideoTransformer3DModel

FOLDER = Path(__file__).parents[1] / "assets" / "parity"


def formula(name: str, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """Return the standard normal float32 tensor that belongs to a name."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def fill(module: torch.nn.Module, salt: int) -> None:
    """Set every entry of the module's state dict by the formula."""
    state = module.state_dict()
    for name, value in state.items():
        random = formula(name, tuple(value.shape), salt)
        if value.ndim == 1:
            state[name] = 1 + 0.1 * random if name.endswith("weight") else 0.02 * random
        else:
            state[name] = random / math.prod(value.shape[1:]) ** 0.5
    module.load_state_dict(state)
    module.eval().requires_grad_(False)


def recorded(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the arrays of a recorded file and its metadata, decoded."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return arrays, {key: json.loads(value) for key, value in file.metadata().items()}


def make_transformer(config: dict[str, Any], salt: int) -> EchoVideoTransformer3DModel:
    """Return the model of a recorded config, whose left out keys take the published values."""
    published = json.loads((FOLDER / "echovideo_5b_config.json").read_text())
    model = EchoVideoTransformer3DModel.from_config({**published, **config})
    fill(model, salt)
    return model


def make_pipeline(facts: dict[str, Any]) -> EchoVideoPipeline:
    """Return the pipeline of a recorded run."""
    vae = AutoencoderKLCogVideoX(**facts["vae"])
    image_encoder = SiglipVisionModel(SiglipVisionConfig(**facts["siglip"]))
    fill(vae, facts["salt"])
    fill(image_encoder, facts["salt"])
    scheduler = {kind.__name__: kind for kind in (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)}
    options = dict(facts["scheduler"])
    return EchoVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=make_transformer(facts["config"], facts["salt"]),
        scheduler=scheduler[options.pop("class")](**options),
        image_encoder=image_encoder,
        image_processor=SiglipImageProcessorPil(),
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative Frobenius error of ours, in float64."""
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())
