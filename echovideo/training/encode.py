"""The networks that turn a take and its caption into a dataset's tensors: VAE encoder, T5, SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from echovideo.conditioning import encode_face_tokens, encode_prompt, face_posterior
from echovideo.engine import check_device, model_dtype
from echovideo.faces.analyzer import Identity
from echovideo.faces.templates import FACE_SIDE
from echovideo.footage.take import Take, face_share
from echovideo.model import folder as model_folder
from echovideo.model.config import TransformerConfig, read_config
from echovideo.settings import EngineSettings
from echovideo.training.dataset import ExampleTensors, NullTensors, ReferenceTensors


class ClipEncoder:
    """One model's encoders, loaded once a process; raises WeightsError, or RunError without the device."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        check_device(settings)
        dtype, device = model_dtype(settings), settings.device
        self.settings = settings
        self.tokens = TransformerConfig.from_dict(read_config(folder / "transformer")).max_text_seq_length
        self.tokenizer = model_folder.load_tokenizer(folder)
        self.text_encoder = model_folder.load_text_encoder(folder, dtype=dtype).to(device)
        self.image_encoder = model_folder.load_image_encoder(folder, dtype=dtype).to(device)
        self.image_processor = model_folder.load_image_processor(folder)
        self.vae = model_folder.load_vae(folder, dtype=model_folder.vae_dtype(dtype)).to(device)

    def example(self, take: Take, caption: str) -> ExampleTensors:
        """Return the tensors of a take under its caption, on the CPU."""
        torch.set_num_threads(self.settings.num_threads)
        mean, std = self._posterior(take.frames_FHWC)
        return ExampleTensors(
            latents_mean_FCHW=mean,
            latents_std_FCHW=std,
            text_ND=self._text(caption),
            face_share_FHW=torch.from_numpy(face_share(take.face_FHW)),
        )

    def reference(self, identity: Identity, sizes: Sequence[tuple[int, int]]) -> ReferenceTensors:
        """Return the tensors of a reference face, its posterior padded for each (height, width), on the CPU."""
        torch.set_num_threads(self.settings.num_threads)
        posteriors = {}
        for height, width in sizes:
            mean, std = face_posterior(self.vae, identity.face_image, height, width)
            posteriors[height, width] = mean.cpu(), std.cpu()
        return ReferenceTensors(
            tokens_ND=self._tokens(identity.face_image),
            embedding_D=torch.from_numpy(identity.embedding),
            posteriors=posteriors,
        )

    def null(self) -> NullTensors:
        """Return what stands for no caption and no face, on the CPU."""
        torch.set_num_threads(self.settings.num_threads)
        return NullTensors(
            text_ND=self._text(""), tokens_ND=self._tokens(np.zeros((FACE_SIDE, FACE_SIDE, 3), dtype=np.uint8))
        )

    def _text(self, caption: str) -> torch.Tensor:
        return encode_prompt(self.tokenizer, self.text_encoder, caption, self.tokens)[0].cpu()

    def _tokens(self, face_image: NDArray[np.uint8]) -> torch.Tensor:
        return encode_face_tokens(self.image_processor, self.image_encoder, face_image)[0].cpu()

    @torch.inference_mode()
    def _posterior(self, frames_FHWC: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation (F', 16, h, w) of the VAE posterior of frames (F, H, W, 3)."""
        pixels = torch.from_numpy(frames_FHWC).to(self.vae.device).permute(3, 0, 1, 2)[None].to(self.vae.dtype)
        posterior = self.vae.encode(pixels / 127.5 - 1).latent_dist
        mean, std = (moments[0].permute(1, 0, 2, 3).cpu() for moments in (posterior.mean, posterior.std))
        return mean, std
