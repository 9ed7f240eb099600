"""What conditions a video: prompt states, face tokens, their fusion, and the face's place in the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save

from echovideo.model.fusion import IdentityImageTextFusion

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX
    from transformers import PreTrainedTokenizerBase, SiglipImageProcessorPil, SiglipVisionModel, T5EncoderModel

SPATIAL_COMPRESSION = 8
TEMPORAL_COMPRESSION = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Condition:
    """All that the DiT is told of one video, the same at every timestep.

    `fused_2ND`: IITF's output (2, 226, text_dim), unconditional half first. `face_mean_CHW`, `face_std_CHW`: moments
    of the VAE posterior of the padded face, each (16, height / 8, width / 8), unscaled; they are moments and not a
    sample because the sample is drawn from the video's own random stream.
    """

    fused_2ND: torch.Tensor  # noqa: N815
    face_mean_CHW: torch.Tensor  # noqa: N815
    face_std_CHW: torch.Tensor  # noqa: N815

    def to_bytes(self) -> bytes:
        """Return the record as safetensors bytes."""
        return save({"fused": self.fused_2ND, "face_mean": self.face_mean_CHW, "face_std": self.face_std_CHW})

    @classmethod
    def from_bytes(cls, data: bytes) -> Condition:
        """Return the record that `to_bytes` wrote."""
        tensors = load(data)
        return cls(fused_2ND=tensors["fused"], face_mean_CHW=tensors["face_mean"], face_std_CHW=tensors["face_std"])


@torch.inference_mode()
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, prompt: str, max_length: int
) -> torch.Tensor:
    """Return T5's last states (1, max_length, text_dim) of the prompt, padded or cut to `max_length` tokens.

    The backbone takes no attention mask: padding tokens are part of what it was trained on.
    """
    tokens = tokenizer(prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    states: torch.Tensor = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
    return states


@torch.inference_mode()
def encode_face_tokens(
    image_processor: SiglipImageProcessorPil, image_encoder: SiglipVisionModel, face_image: np.ndarray[Any, Any]
) -> torch.Tensor:
    """Return SigLIP's last hidden states (1, 196, width) of a uint8 RGB (H, W, 3) face."""
    pixels = image_processor(images=face_image, return_tensors="pt").pixel_values
    states: torch.Tensor = image_encoder(pixels.to(image_encoder.device, image_encoder.dtype)).last_hidden_state
    return states


@torch.inference_mode()
def fuse_condition(
    fusion: IdentityImageTextFusion,
    *,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    face_tokens: torch.Tensor,
    empty_face_tokens: torch.Tensor,
    face_embedding: torch.Tensor,
) -> torch.Tensor:
    """Return IITF's output (2, 226, text_dim): unconditional half, then conditional half.

    The unconditional half fuses the negative prompt, the tokens of an all-zero image and a zero embedding, which
    still passes through the resampler. Embeds are (1, 226, text_dim), tokens (1, 196, width), embedding (1, width).
    """
    like = fusion.text_proj.weight
    embedding = face_embedding.to(like)
    # One half at a time: guidance halves then give the same bits on one GPU and on two.
    unconditional = fusion.fuse(
        negative_prompt_embeds.to(like), empty_face_tokens.to(like), torch.zeros_like(embedding)
    )
    conditional = fusion.fuse(prompt_embeds.to(like), face_tokens.to(like), embedding)
    return torch.cat([unconditional, conditional])


@torch.inference_mode()
def face_posterior(
    vae: AutoencoderKLCogVideoX, face_image: np.ndarray[Any, Any], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, each (16, height / 8, width / 8), of the VAE posterior of the face.

    The uint8 RGB face is padded with black to the video's aspect ratio, resized with Lanczos and encoded as one frame.
    """
    from diffusers.video_processor import VideoProcessor

    padded = Image.fromarray(pad_to_aspect(face_image, width / height))
    pixels = VideoProcessor(vae_scale_factor=SPATIAL_COMPRESSION).preprocess(padded, height=height, width=width)
    posterior = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
    return posterior.mean[0, :, 0], posterior.std[0, :, 0]


def pad_to_aspect(image: np.ndarray[Any, Any], aspect: float) -> np.ndarray[Any, Any]:
    """Return the uint8 (H, W, 3) image centred on black, widened or heightened until W / H is `aspect`."""
    height, width = image.shape[:2]
    pad_width = max(int(height * aspect) - width, 0)
    pad_height = max(int(width / aspect) - height, 0) if pad_width == 0 else 0
    top, left = pad_height // 2, pad_width // 2
    return np.pad(image, ((top, pad_height - top), (left, pad_width - left), (0, 0)))


def place_face_latents(face_CHW: torch.Tensor, num_latent_frames: int) -> torch.Tensor:
    """Return (1, F, 16, h, w): the face's latents in the first frame, zeros in all others."""
    return F.pad(face_CHW[None, None], (0, 0, 0, 0, 0, 0, 0, num_latent_frames - 1))
