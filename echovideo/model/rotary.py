"""Rotary position tables of the video tokens."""

from __future__ import annotations

import torch

BASE_GRID = (30, 45)
"""Patch rows and columns of 480 x 720, which the published model fits every size and orientation into."""


def rotary_tables(
    num_latent_frames: int,
    grid_height: int,
    grid_width: int,
    head_dim: int = 64,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), each (frames * grid_height * grid_width, head_dim) float32, for a grid of patches.

    The grid is fitted into the 30 x 45 base grid, centred, keeping its aspect ratio.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=head_dim,
        crops_coords=_fitted_region(grid_height, grid_width),
        grid_size=(grid_height, grid_width),
        temporal_size=num_latent_frames,
        device=torch.device(device) if device is not None else None,
    )
    return cos, sin


def _fitted_region(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    base_height, base_width = BASE_GRID
    if height / width > base_height / base_width:
        fitted_height, fitted_width = base_height, round(base_height / height * width)
    else:
        fitted_height, fitted_width = round(base_width / width * height), base_width
    top, left = round((base_height - fitted_height) / 2), round((base_width - fitted_width) / 2)
    return (top, left), (top + fitted_height, left + fitted_width)
