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

from echovideo.model.config import Recompute, TransformerConfig
from echovideo.model.fusion import IdentityImageTextFusion
from echovideo.model.recompute import recomputed
from echovideo_kernels import (
    FOLDED_SCALE,
    attention,
    folded_query_scale,
    linear,
    linear_gelu,
    modulated_norm,
    modulated_norm_,
    qk_norm_rope,
    qk_norm_rope_,
)


class Linear(nn.Linear):
    """A linear layer of all tokens, which sums its bias's gradient over very many rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Embeds text tokens and the latents' patches into the hidden width, as one joint sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.inner_dim, config.patch_size, config.patch_size)
        self.text_proj = nn.Linear(config.text_embed_dim, config.inner_dim)

    def forward(self, text_BND: torch.Tensor, latents_BFCHW: torch.Tensor) -> torch.Tensor:
        patches = self.proj(latents_BFCHW.flatten(0, 1)).flatten(2).transpose(1, 2)
        patches = patches.unflatten(0, latents_BFCHW.shape[:2]).flatten(1, 2)
        return torch.cat([self.text_proj(text_BND), patches], dim=1)


class ModulatedNorm(nn.Module):
    """LayerNorm whose shift, scale and the next branch's gate come from the timestep, apart for video and text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.inner_dim)
        self.norm = nn.LayerNorm(config.inner_dim, eps=config.norm_eps)

    def forward(
        self,
        x_BND: torch.Tensor,
        branch_BND: torch.Tensor | None,
        gate_B2D: torch.Tensor | None,
        time_BD: torch.Tensor,
        num_text: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x + gate * branch, its normed and modulated tokens, and the gate of the branch they will make.

        Gates hold the video's at index 0, the text's at 1. Without gradients the sum takes the place of x in memory.
        """
        shift, scale, gate = self.linear(F.silu(time_BD)).unflatten(-1, (2, 3, -1)).unbind(2)
        norm = modulated_norm if torch.is_grad_enabled() else modulated_norm_
        x, y = norm(
            x_BND,
            shift,
            scale,
            self.norm.weight,
            self.norm.bias,
            branch_BND,
            gate_B2D,
            num_text=num_text,
            eps=self.norm.eps,
        )
        return x, y, gate


class JointAttention(nn.Module):
    """Full attention over text and video tokens, with per-head normed queries and keys, video rotated."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_scale = folded_query_scale(config.attention_head_dim)
        dim = config.inner_dim
        self.norm_q = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.to_q = Linear(dim, dim, bias=config.attention_bias)
        self.to_k = Linear(dim, dim, bias=config.attention_bias)
        self.to_v = Linear(dim, dim, bias=config.attention_bias)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x_BND: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, k, v = (proj(x_BND).unflatten(-1, (self.num_heads, -1)) for proj in (self.to_q, self.to_k, self.to_v))
        norm_rope = qk_norm_rope if torch.is_grad_enabled() else qk_norm_rope_
        q, k = norm_rope(
            q,
            k,
            self.norm_q.weight,
            self.norm_q.bias,
            self.norm_k.weight,
            self.norm_k.bias,
            *rotary,
            q_scale=self.q_scale,
            eps=self.norm_q.eps,
        )
        out: torch.Tensor = self.to_out[0](attention(q, k, v, FOLDED_SCALE).flatten(2))
        return out


class _GeluProjection(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return F.gelu(self.proj(x), approximate="tanh")
        return linear_gelu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; the index gap in `net` is the published checkpoint's dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GeluProjection(dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Modulated joint attention, then modulated feed-forward; each is gated onto the residual by the next norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config)
        self.attn1 = JointAttention(config)
        self.norm2 = ModulatedNorm(config)
        self.ff = FeedForward(config.inner_dim)

    def forward(
        self,
        x_BND: torch.Tensor,
        branch_BND: torch.Tensor | None,
        gate_B2D: torch.Tensor | None,
        time_BD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take and return the residual stream as x, branch and gate, whose sum x + gate * branch is still to be made.

        The video's tokens come last, as many as `rotary` has rows. Without gradients x's memory is written to.
        """
        num_text = x_BND.shape[1] - len(rotary[0])
        x, y, gate = self.norm1(x_BND, branch_BND, gate_B2D, time_BD, num_text)
        x, y, gate = self.norm2(x, self.attn1(y, rotary), gate, time_BD, num_text)
        return x, self.ff(y), gate


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
        self.recomputed_blocks = 0
        """How many blocks, from the first, compute again in the backward pass what `recompute` names."""
        self.recompute: Recompute = "products"

    @classmethod
    def from_config(cls, config: TransformerConfig | Mapping[str, Any]) -> Self:
        """Build with fresh weights from a config or its published dict; raises WeightsError on unknown keys."""
        return cls(config if isinstance(config, TransformerConfig) else TransformerConfig.from_dict(config))

    def denoise(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        timestep: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return the predicted velocity (B, F, out_channels, h, w).

        Takes latents (B, F, in_channels, h, w), `fuse`'s condition (B, 226, text_dim), integer timesteps (B,) and
        `rotary_tables` of the patch grid. h and w are even. Raises ValueError for tables of another grid.
        """
        batch, num_frames, _, height, width = hidden_states.shape
        p = self.config.patch_size
        time = get_timestep_embedding(timestep, self.config.inner_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embedding(time.to(hidden_states.dtype))
        x = self.patch_embed(condition, hidden_states)
        num_video = x.shape[1] - condition.shape[1]
        if len(image_rotary_emb[0]) != num_video:
            raise ValueError(f"rotary tables of {len(image_rotary_emb[0])} tokens for a video of {num_video}")
        residual: tuple[Any, ...] = (x, None, None)
        for i, block in enumerate(self.transformer_blocks):
            inputs = (*residual, time, image_rotary_emb)
            if i < self.recomputed_blocks and torch.is_grad_enabled():
                residual = recomputed(block, self.recompute, *inputs)
            else:
                residual = block(*inputs)
        x, branch, gate = residual
        # What is left acts on each token by itself, so the text tokens, which nothing reads any more, are left out.
        video = x[:, -num_video:] + gate[:, :1] * branch[:, -num_video:]
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
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Fuse, then denoise, under the published argument names; see `fuse` and `denoise` for shapes."""
        condition = self.fuse(encoder_hidden_states, encoder_face_hidden_states, encoder_face_feats_hidden_states)
        sample = self.denoise(hidden_states, condition, timestep, image_rotary_emb)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
