"""The EchoVideo transformer: a CogVideoX diffusion transformer that carries IITF's parameters at its top level.

Parameter names and shapes are the published checkpoint's (bytedance-research/EchoVideo). Backbone: CogVideoX,
arXiv 2408.06072. Letters in names: B batch, N tokens (text first, then video), H heads, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from echovideo.model.config import TransformerConfig
from echovideo.model.fusion import IdentityImageTextFusion
from echovideo.model.rotary import apply_rotary
from echovideo_kernels import attention


class PatchEmbed(nn.Module):
    """Embeds text tokens and the latents' patches into the hidden width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.inner_dim, config.patch_size, config.patch_size)
        self.text_proj = nn.Linear(config.text_embed_dim, config.inner_dim)

    def forward(self, text_BND: torch.Tensor, latents_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.proj(latents_BFCHW.flatten(0, 1)).flatten(2).transpose(1, 2)
        return self.text_proj(text_BND), patches.unflatten(0, latents_BFCHW.shape[:2]).flatten(1, 2)


class ModulatedNorm(nn.Module):
    """LayerNorm whose shift, scale and the branch's gate come from the timestep, apart for video and text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.inner_dim)
        self.norm = nn.LayerNorm(config.inner_dim, eps=config.norm_eps)

    def forward(
        self, video_BND: torch.Tensor, text_BND: torch.Tensor, time_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the joint normed tokens (text first) and the gates of video and text, each (B, 1, D)."""
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(F.silu(time_BD))[:, None].chunk(6, dim=-1)
        video = self.norm(video_BND) * (1 + scale) + shift
        text = self.norm(text_BND) * (1 + text_scale) + text_shift
        return torch.cat([text, video], dim=1), gate, text_gate


class JointAttention(nn.Module):
    """Full attention over text and video tokens, with per-head normed queries and keys, video rotated."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        dim = config.inner_dim
        self.norm_q = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.to_q = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_k = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_v = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x_BND: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        q, k, v = (proj(x_BND).unflatten(-1, (self.num_heads, -1)) for proj in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = _rotate_video(q, *rotary), _rotate_video(k, *rotary)
        out: torch.Tensor = self.to_out[0](attention(q, k, v).flatten(2))
        return out


def _rotate_video(x_BNHD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    num_text = x_BNHD.shape[1] - len(cos_ND)
    text, video = x_BNHD[:, :num_text], x_BNHD[:, num_text:]
    return torch.cat([text, apply_rotary(video, cos_ND, sin_ND)], dim=1)


class _GeluProjection(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; the index gap in `net` is the published checkpoint's dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GeluProjection(dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Modulated joint attention, then modulated feed-forward, each gated onto its residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config)
        self.attn1 = JointAttention(config)
        self.norm2 = ModulatedNorm(config)
        self.ff = FeedForward(config.inner_dim)

    def forward(
        self,
        video_BND: torch.Tensor,
        text_BND: torch.Tensor,
        time_BD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_text = text_BND.shape[1]
        joint, gate, text_gate = self.norm1(video_BND, text_BND, time_BD)
        joint = self.attn1(joint, rotary)
        video, text = video_BND + gate * joint[:, num_text:], text_BND + text_gate * joint[:, :num_text]
        joint, gate, text_gate = self.norm2(video, text, time_BD)
        joint = self.ff(joint)
        return video + gate * joint[:, num_text:], text + text_gate * joint[:, :num_text]


class OutputNorm(nn.Module):
    """The last LayerNorm, shifted and scaled by the timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.inner_dim)
        self.norm = nn.LayerNorm(config.inner_dim, eps=config.norm_eps)

    def forward(self, x_BND: torch.Tensor, time_BD: torch.Tensor) -> torch.Tensor:
        shift, scale = self.linear(F.silu(time_BD))[:, None].chunk(2, dim=-1)
        out: torch.Tensor = self.norm(x_BND) * (1 + scale) + shift
        return out


class EchoVideoTransformer3DModel(IdentityImageTextFusion):
    """Predicts the velocity of noisy video latents under a fused identity-and-text condition.

    It is an IITF module with a backbone, because the published checkpoint keeps both at one level. `fuse` makes
    the condition, once a video; `denoise` is one evaluation under it; `forward` is both, as published.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimestepEmbedding(config.inner_dim, config.time_embed_dim, "silu")
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.inner_dim, eps=config.norm_eps)
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(config.inner_dim, config.patch_size**2 * config.out_channels)

    @classmethod
    def from_config(cls, config: TransformerConfig | Mapping[str, Any]) -> Self:
        """Build with fresh weights from a config or its published dict; raises WeightsError on unknown keys."""
        return cls(config if isinstance(config, TransformerConfig) else TransformerConfig.from_dict(config))

    def denoise(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        timestep: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the predicted velocity (B, F, out_channels, h, w).

        Takes latents (B, F, in_channels, h, w), `fuse`'s condition (B, 226, text_dim), integer timesteps (B,) and
        `rotary_tables` of the patch grid. h and w are even.
        """
        batch, num_frames, _, height, width = hidden_states.shape
        p = self.config.patch_size
        time = get_timestep_embedding(timestep, self.config.inner_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embedding(time.to(hidden_states.dtype))
        text, video = self.patch_embed(condition, hidden_states)
        for block in self.transformer_blocks:
            video, text = block(video, text, time, image_rotary_emb)
        # The last norm acts on each token by itself, so the text tokens, which nothing reads any more, are left out.
        patches = self.proj_out(self.norm_out(self.norm_final(video), time))
        patches = patches.view(batch, num_frames, height // p, width // p, self.config.out_channels, p, p)
        sample: torch.Tensor = patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, num_frames, -1, height, width)
        return sample

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_face_hidden_states: torch.Tensor,
        encoder_face_feats_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Fuse, then denoise, under the published argument names; see `fuse` and `denoise` for shapes."""
        condition = self.fuse(encoder_hidden_states, encoder_face_hidden_states, encoder_face_feats_hidden_states)
        sample = self.denoise(hidden_states, condition, timestep, image_rotary_emb)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
