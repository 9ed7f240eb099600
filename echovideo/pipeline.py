"""EchoVideoPipeline: one photo and one prompt in, one video out, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from transformers import PreTrainedTokenizerBase, SiglipImageProcessorPil, SiglipVisionModel, T5EncoderModel

from echovideo.conditioning import (
    Condition,
    encode_face_tokens,
    encode_prompt,
    face_posterior,
    fuse_condition,
)
from echovideo.engine import to_uint8
from echovideo.errors import RequestError
from echovideo.faces.analyzer import FaceAnalyzer
from echovideo.faces.packs import open_pack
from echovideo.model import folder as model_folder
from echovideo.model.card import resolve_folder
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.request import (
    DEFAULT_FPS,
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    GuidanceSchedule,
    check_choice,
    check_num_frames,
    check_sampling,
    check_size,
    frames_for_seconds,
    parse_size,
)
from echovideo.sampler import Scheduler, advance, decode, denoise_step, prepare

OutputType = Literal["latent", "pt", "np", "pil"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EchoVideoPipelineOutput:
    """`frames` by output type: "latent" (B, F, 16, h, w) and "pt" (B, frames, 3, H, W) in [0, 1] tensors,

    "np" (B, frames, H, W, 3) float32 in [0, 1], "pil" a list of lists of images.
    """

    frames: Any


class EchoVideoPipeline:
    """The published inference call over the sampler's atoms. An encoder may be None when its output is given."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: T5EncoderModel | None,
        vae: AutoencoderKLCogVideoX,
        transformer: EchoVideoTransformer3DModel,
        scheduler: Scheduler,
        image_encoder: SiglipVisionModel | None,
        image_processor: SiglipImageProcessorPil | None,
        face_analyzer: FaceAnalyzer | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.transformer = transformer
        self.scheduler = scheduler
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.face_analyzer = face_analyzer

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load every part of a model folder in the published layout; raises WeightsError naming what is wrong.

        The face analyzer is loaded where the folder has a `face_encoder/`.
        """
        folder = resolve_folder(folder_or_hub_id)
        face_folder = folder / "face_encoder"
        return cls(
            tokenizer=model_folder.load_tokenizer(folder),
            text_encoder=model_folder.load_text_encoder(folder, dtype=dtype).to(device),
            vae=model_folder.load_vae(folder, dtype=model_folder.vae_dtype(dtype)).to(device),
            transformer=model_folder.load_transformer(folder, dtype=dtype).to(device),
            scheduler=model_folder.load_scheduler(folder),
            image_encoder=model_folder.load_image_encoder(folder, dtype=dtype).to(device),
            image_processor=model_folder.load_image_processor(folder),
            face_analyzer=FaceAnalyzer(open_pack(face_folder)) if face_folder.is_dir() else None,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every part that is present in the published layout, as safetensors; face nets are not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model_folder.save_transformer(self.transformer, folder)
        model_folder.save_vae(self.vae, folder)
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.text_encoder is not None:
            model_folder.save_text_encoder(self.text_encoder, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")
        if self.image_encoder is not None:
            model_folder.save_image_encoder(self.image_encoder, folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / "clip_visual_encoder")

    def __call__(
        self,
        photo: bytes | str | Path | None = None,
        prompt: str | None = None,
        negative_prompt: str = "",
        *,
        face_image: np.ndarray[Any, Any] | None = None,
        face_embedding: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seconds: float | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        guidance_schedule: GuidanceSchedule = "published",
        generator: torch.Generator | None = None,
        output_type: OutputType = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
    ) -> EchoVideoPipelineOutput:
        """Render one video.

        Give `photo` (a file's path or bytes) or `face_image` (uint8 RGB (H, W, 3), aligned, background black) with
        `face_embedding` (1, width), raw; and `prompt` or `prompt_embeds` with `negative_prompt_embeds`, each
        (1, 226, text_dim). Length is `num_frames` (8k+1, up to 49) or `seconds` at 16 fps; it and the size are as the
        model was trained unless given. `generator` drives every random number; without one the seed is random.
        `callback(step, timestep, latents)` runs after each step.
        Raises RequestError or PhotoRefusedError before any model runs where it can.
        """
        trained = self.transformer.config
        own_height, own_width = parse_size(trained.default_size)
        height, width = own_height if height is None else height, own_width if width is None else width
        check_size(height, width)
        if num_frames is not None and seconds is not None:
            raise RequestError("give num_frames or seconds, not both", code="invalid_num_frames")
        if seconds is not None:
            num_frames = frames_for_seconds(seconds, DEFAULT_FPS)
        num_frames = trained.sample_frames if num_frames is None else num_frames
        check_num_frames(num_frames)
        check_sampling(num_inference_steps, guidance_scale, guidance_schedule)
        check_choice("output_type", output_type, OutputType)

        if face_image is None or face_embedding is None:
            face_image, face_embedding = self._identify(photo, face_image, face_embedding)
        if prompt_embeds is None:
            if prompt is None:
                raise RequestError("give prompt or prompt_embeds", code="invalid_prompt")
            prompt_embeds = self._encode_prompt(prompt)
        if negative_prompt_embeds is None:
            negative_prompt_embeds = self._encode_prompt(negative_prompt)
        if self.image_encoder is None or self.image_processor is None:
            raise RequestError("this pipeline has no image encoder, so it cannot read the face")

        mean, std = face_posterior(self.vae, face_image, height, width)
        state = prepare(
            self.transformer,
            self.vae,
            self.scheduler,
            Condition(
                fused_2ND=fuse_condition(
                    self.transformer,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    face_tokens=encode_face_tokens(self.image_processor, self.image_encoder, face_image),
                    empty_face_tokens=encode_face_tokens(
                        self.image_processor, self.image_encoder, np.zeros_like(face_image)
                    ),
                    face_embedding=face_embedding,
                ),
                face_mean_CHW=mean,
                face_std_CHW=std,
            ),
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            generator=generator or _random_generator(),
        )
        while not state.done:
            timestep = state.timesteps[state.step]
            state = advance(state, denoise_step(self.transformer, state))
            if callback is not None:
                callback(state.step - 1, timestep, state.latents_BFCHW)
        if output_type == "latent":
            return EchoVideoPipelineOutput(frames=state.latents_BFCHW)
        return EchoVideoPipelineOutput(frames=_as_output(decode(self.vae, state.latents_BFCHW), output_type))

    def _identify(
        self,
        photo: bytes | str | Path | None,
        face_image: np.ndarray[Any, Any] | None,
        face_embedding: torch.Tensor | None,
    ) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        if photo is None or face_image is not None or face_embedding is not None:
            raise RequestError("give photo alone, or face_image and face_embedding together", code="invalid_photo")
        if self.face_analyzer is None:
            raise RequestError(
                "this pipeline has no face nets; give face_image and face_embedding", code="invalid_photo"
            )
        identity = self.face_analyzer.analyze(photo if isinstance(photo, bytes) else Path(photo).read_bytes())
        return identity.face_image, torch.from_numpy(identity.embedding)[None]

    def _encode_prompt(self, prompt: str) -> torch.Tensor:
        if self.tokenizer is None or self.text_encoder is None:
            raise RequestError("this pipeline has no text encoder; give prompt_embeds and negative_prompt_embeds")
        return encode_prompt(self.tokenizer, self.text_encoder, prompt, self.transformer.config.max_text_seq_length)


def _random_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _as_output(video_BFCHW: torch.Tensor, output_type: OutputType) -> Any:
    if output_type == "pt":
        return video_BFCHW
    if output_type == "np":
        return video_BFCHW.permute(0, 1, 3, 4, 2).cpu().numpy()
    return [[Image.fromarray(frame) for frame in to_uint8(video[None])] for video in video_BFCHW]
