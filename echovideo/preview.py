"""Small pictures of a video in the making, from its latents alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F

from echovideo.conditioning import SPATIAL_COMPRESSION
from echovideo.video import poster_jpeg

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

_MAX_SIDE = 320
_FIT_SIDE = 128
_FIT_COLOURS = 8


class LatentPreview:
    """A linear map from a latent pixel's 16 channels to red, green and blue: rough, and a thousandth of a decode.

    `to_rgb` is float32 (17, 3), the last row a constant; its result is in -1 to 1.
    """

    def __init__(self, to_rgb: torch.Tensor) -> None:
        self.to_rgb = to_rgb

    @classmethod
    @torch.inference_mode()
    def fit(cls, vae: AutoencoderKLCogVideoX) -> Self:
        """Return the least-squares map of this VAE, from one picture of smooth random colours and its latents."""
        colours = torch.rand((1, 3, _FIT_COLOURS, _FIT_COLOURS), generator=torch.Generator().manual_seed(0)) * 2 - 1
        picture_BCHW = F.interpolate(colours, size=(_FIT_SIDE, _FIT_SIDE), mode="bilinear")
        posterior = vae.encode(picture_BCHW.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
        latents_NC = (posterior.mean[0, :, 0] * vae.config.scaling_factor).flatten(1).T.float().cpu()
        wanted_NC = F.avg_pool2d(picture_BCHW, SPATIAL_COMPRESSION)[0].flatten(1).T
        return cls(torch.linalg.lstsq(_with_constant(latents_NC), wanted_NC).solution)

    @torch.inference_mode()
    def jpeg(self, latents_BFCHW: torch.Tensor) -> bytes:
        """Return the middle frame of latents (1, F, 16, h, w) as a JPEG, its longer side 320 px."""
        _, num_frames, channels, height, width = latents_BFCHW.shape
        latents_NC = latents_BFCHW[0, num_frames // 2].float().cpu().reshape(channels, -1).T
        rgb_HWC = (_with_constant(latents_NC) @ self.to_rgb).reshape(height, width, 3)
        scale = _MAX_SIDE / max(height, width)
        size = (round(height * scale), round(width * scale))
        large_CHW = F.interpolate(rgb_HWC.permute(2, 0, 1)[None], size=size, mode="bilinear")[0]
        pixels = ((large_CHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        return poster_jpeg(np.ascontiguousarray(pixels.numpy()), max_side=_MAX_SIDE)


def _with_constant(latents_NC: torch.Tensor) -> torch.Tensor:
    return F.pad(latents_NC, (0, 1), value=1.0)
