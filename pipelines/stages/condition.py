"""Condition stage: prompt and identity become the condition that the DiT is given, with T5, SigLIP and IITF."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from echovideo.conditioning import Condition, encode_face_tokens, encode_prompt, face_posterior, fuse_condition
from echovideo.engine import check_device, model_dtype
from echovideo.faces.analyzer import Identity
from echovideo.model import folder as model_folder
from echovideo.model.fusion import IdentityImageTextFusion
from echovideo.training.adapters import AdapterSlot
from pipelines.config import RunConfig
from pipelines.ledger import Claim
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage, put_identity

_REMEMBERED = 64


class Conditioner:
    """The networks that make conditions, with their results remembered by prompt and by identity."""

    def __init__(self, config: RunConfig) -> None:
        folder, dtype, device = Path(config.model), model_dtype(config.engine), config.engine.device
        check_device(config.engine)
        self.num_threads = config.engine.num_threads
        self.tokenizer = model_folder.load_tokenizer(folder)
        self.text_encoder = model_folder.load_text_encoder(folder, dtype=dtype).to(device)
        self.image_encoder = model_folder.load_image_encoder(folder, dtype=dtype).to(device)
        self.image_processor = model_folder.load_image_processor(folder)
        self.fusion = IdentityImageTextFusion.from_pretrained(folder / "transformer", dtype=dtype).to(device)
        self.adapter = AdapterSlot(self.fusion)
        self.vae = model_folder.load_vae(folder, dtype=model_folder.vae_dtype(dtype)).to(device)
        self.prompt_states = lru_cache(_REMEMBERED)(self._prompt_states)
        self.face_tokens = lru_cache(_REMEMBERED)(self._face_tokens)
        self.posterior = lru_cache(_REMEMBERED)(self._posterior)

    def condition(self, prompt: str, negative_prompt: str, identity: bytes, height: int, width: int) -> Condition:
        """Return the condition on CPU, for an identity's bytes and a size in pixels."""
        torch.set_num_threads(self.num_threads)
        embedding = torch.from_numpy(Identity.from_bytes(identity).embedding)[None]
        fused = fuse_condition(
            self.fusion,
            prompt_embeds=self.prompt_states(prompt),
            negative_prompt_embeds=self.prompt_states(negative_prompt),
            face_tokens=self.face_tokens(identity),
            empty_face_tokens=self.face_tokens(None),
            face_embedding=embedding,
        )
        mean, std = self.posterior(identity, height, width)
        return Condition(fused_2ND=fused.cpu(), face_mean_CHW=mean.cpu(), face_std_CHW=std.cpu())

    def _prompt_states(self, prompt: str) -> torch.Tensor:
        return encode_prompt(self.tokenizer, self.text_encoder, prompt, self.fusion.config.max_text_seq_length)

    def _face_tokens(self, identity: bytes | None) -> torch.Tensor:
        """Return SigLIP's tokens of the identity's face; None stands for the all-zero image."""
        face = np.zeros((512, 512, 3), np.uint8) if identity is None else Identity.from_bytes(identity).face_image
        return encode_face_tokens(self.image_processor, self.image_encoder, face)

    def _posterior(self, identity: bytes, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return face_posterior(self.vae, Identity.from_bytes(identity).face_image, height, width)


class ConditionStage(Stage):
    """Makes each row's condition."""

    name = "condition"

    def __init__(self, config: RunConfig, epoch: int) -> None:
        super().__init__(config, epoch)
        self.conditioner = Conditioner(config)

    def work(self, row: Row, claim: Claim) -> Row:
        """Return the row with its condition in the identity's place."""
        assert row.identity is not None
        request = row.request
        put_identity(self.conditioner.adapter, self.config, request)
        condition = self.conditioner.condition(
            request.prompt, request.negative_prompt, row.identity, request.height, request.width
        )
        return replace(row, condition=condition.to_bytes())
