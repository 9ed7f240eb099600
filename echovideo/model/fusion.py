"""IITF, identity image-text fusion: face embedding, face image tokens and text tokens become one condition.

Method: EchoVideo, arXiv 2501.13452, section 3. Letters in names: B batch, N tokens, H heads, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from echovideo.model.config import TransformerConfig, read_config
from echovideo.model.weights import load_weights


class PerceiverAttention(nn.Module):
    """Learned queries attend to the input tokens and to themselves."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x_BND: torch.Tensor, latents_BND: torch.Tensor) -> torch.Tensor:
        x, latents = self.norm1(x_BND), self.norm2(latents_BND)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class PerceiverResampler(nn.Module):
    """Turns any number of face embedding tokens into `num_queries` tokens of the face image's width."""

    def __init__(
        self, *, dim: int, depth: int, num_heads: int, head_dim: int, num_queries: int, in_dim: int, out_dim: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(in_dim, dim)
        self.proj_out = nn.Linear(dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, num_heads, head_dim),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, 4 * dim, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * dim, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(x_BND), -1, -1)
        x = self.proj_in(x_BND)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        out: torch.Tensor = self.norm_out(self.proj_out(latents))
        return out


class IdentityImageTextFusion(nn.Module):
    """IITF by itself: the four fusion parts of the published checkpoint, under their published names.

    `face_prj_wofc` resamples the face embedding, `face_info_proj` and `text_proj` are linear maps over the token
    axis, `face_proj` maps the face image's width to the text's. The output does not depend on the timestep.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.face_proj = nn.Linear(config.face_embed_dim, config.text_embed_dim)
        self.text_proj = nn.Linear(config.face_seq_length + config.max_text_seq_length, config.max_text_seq_length)
        self.face_info_proj = nn.Linear(config.resampler_num_queries + config.face_seq_length, config.face_seq_length)
        self.face_prj_wofc = PerceiverResampler(
            dim=config.resampler_dim,
            depth=config.resampler_depth,
            num_heads=config.resampler_num_heads,
            head_dim=config.resampler_head_dim,
            num_queries=config.resampler_num_queries,
            in_dim=config.face_features_embed_dim,
            out_dim=config.face_embed_dim,
        )

    @classmethod
    def from_pretrained(cls, folder: Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load from a `transformer/` folder: of a whole transformer's weights this class takes only its own.

        Raises WeightsError naming the file and tensor.
        """
        config = TransformerConfig.from_dict(read_config(folder))
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype=dtype, subset=cls is IdentityImageTextFusion)
        return model.eval()

    def fuse(
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_face_hidden_states: torch.Tensor,
        encoder_face_feats_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Return the fused condition (B, 226, text_dim) that takes the text tokens' place in the transformer.

        Takes T5 states (B, 226, text_dim), SigLIP tokens (B, 196, 768) and the raw face embedding (B, width), or
        its copies (B, 144, width): the published model resamples 144 identical tokens, which is not the same as one.
        """
        face_feats = encoder_face_feats_hidden_states
        if face_feats.ndim == 2:
            face_feats = face_feats[:, None].expand(-1, self.config.face_features_seq_length, -1)
        identity = self.face_prj_wofc(face_feats)
        face = torch.cat([identity, encoder_face_hidden_states], dim=1)
        face = self.face_proj(self.face_info_proj(face.transpose(1, 2)).transpose(1, 2))
        joint = torch.cat([face, encoder_hidden_states], dim=1)
        fused: torch.Tensor = self.text_proj(joint.transpose(1, 2)).transpose(1, 2)
        return fused

    forward = fuse
