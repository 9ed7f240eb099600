"""A model folder in the published layout: which part lives where, and how each is opened and saved.

transformer/ vae/ text_encoder/ tokenizer/ scheduler/ clip_visual_encoder/ face_encoder/.

A part's class is imported where the part is opened: that takes seconds, and most processes open only some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from echovideo.errors import WeightsError
from echovideo.model.config import read_config, read_json
from echovideo.model.weights import load_weights, save_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX
    from transformers import PreTrainedTokenizerBase, SiglipImageProcessorPil, SiglipVisionModel, T5EncoderModel

    from echovideo.model.transformer import EchoVideoTransformer3DModel
    from echovideo.sampler import Scheduler


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the VAE's type beside a model of `dtype`: the published run decodes in float16 beside bfloat16."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def load_vae(folder: Path, *, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """Load `vae/`; raises WeightsError naming the file and tensor."""
    from diffusers import AutoencoderKLCogVideoX

    config = read_config(folder / "vae")
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(config)
    load_weights(vae, folder / "vae", dtype=dtype)
    return vae.eval()


def load_text_encoder(folder: Path, *, dtype: torch.dtype) -> T5EncoderModel:
    """Load `text_encoder/`; raises WeightsError naming the file and tensor."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config.from_dict(read_config(folder / "text_encoder"))
    with torch.device("meta"):
        model = T5EncoderModel(config)
    load_weights(model, folder / "text_encoder", dtype=dtype)
    return model.eval()


def load_image_encoder(folder: Path, *, dtype: torch.dtype) -> SiglipVisionModel:
    """Load `clip_visual_encoder/`, whose tensors may carry the prefix older transformers gave them."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    values = read_config(folder / "clip_visual_encoder")
    # Not on the meta device: its position ids are computed, not stored.
    model = SiglipVisionModel(SiglipVisionConfig.from_dict(values.get("vision_config") or values))

    def rename(name: str) -> str | None:
        # A whole SigLIP is a valid folder too: its text tower is not ours to load.
        return None if name.startswith(("text_model.", "logit_")) else name.removeprefix("vision_model.")

    load_weights(model, folder / "clip_visual_encoder", dtype=dtype, rename=rename)
    return model.eval()


def load_image_processor(folder: Path) -> SiglipImageProcessorPil:
    """Load `clip_visual_encoder/`'s PIL processor, whose bicubic filter the recorded numbers were made with."""
    from transformers import SiglipImageProcessorPil

    with _explained(folder / "clip_visual_encoder"):
        return SiglipImageProcessorPil.from_pretrained(folder / "clip_visual_encoder")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load `tokenizer/`."""
    from transformers import AutoTokenizer

    with _explained(folder / "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        return tokenizer


def load_scheduler(folder: Path) -> Scheduler:
    """Load `scheduler/scheduler_config.json`, a CogVideoX DPM or DDIM scheduler."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    classes: Mapping[str, type[Scheduler]] = {
        cls.__name__: cls for cls in (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)
    }
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = str(config.get("_class_name"))
    if name not in classes:
        raise WeightsError(f"{path}: scheduler {name!r} is not one of {', '.join(classes)}")
    scheduler: Scheduler = classes[name].from_config(config)
    return scheduler


def load_transformer(folder: Path, *, dtype: torch.dtype) -> EchoVideoTransformer3DModel:
    """Load `transformer/`; raises WeightsError naming the file and tensor."""
    from echovideo.model.transformer import EchoVideoTransformer3DModel

    return EchoVideoTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)


def save_transformer(model: EchoVideoTransformer3DModel, folder: Path) -> None:
    """Write `transformer/` in the published layout."""
    save_weights(model, folder / "transformer", model.config.to_dict(), "diffusion_pytorch_model")


def save_vae(vae: AutoencoderKLCogVideoX, folder: Path) -> None:
    """Write `vae/` in the published layout."""
    config = {"_class_name": type(vae).__name__, **_plain(vae.config)}
    save_weights(vae, folder / "vae", config, "diffusion_pytorch_model")


def save_text_encoder(model: T5EncoderModel, folder: Path) -> None:
    """Write `text_encoder/` in the published layout."""
    save_weights(model, folder / "text_encoder", model.config.to_dict(), "model")


def save_image_encoder(model: SiglipVisionModel, folder: Path) -> None:
    """Write `clip_visual_encoder/`'s model in the published layout."""
    save_weights(model, folder / "clip_visual_encoder", model.config.to_dict(), "model")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out diffusers' own notes: one of them is a list in hash order, other bytes in every process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn a library's loading error into a WeightsError that names the folder."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is missing: is {folder.parent} a whole model folder?")
    try:
        yield
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} cannot be loaded: {error}") from error
