"""Which group of the settings each parameter of the transformer belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from echovideo.training.settings import Group

_OF_MODEL: dict[str, Group] = {
    "face_proj": "fusion",
    "text_proj": "fusion",
    "face_info_proj": "fusion",
    "face_prj_wofc": "fusion",
    "patch_embed": "patch_embed",
    "time_embedding": "norms",
    "norm_final": "output",
    "norm_out": "output",
    "proj_out": "output",
}
_OF_BLOCK: dict[str, Group] = {"attn1": "attention", "ff": "feed_forward", "norm1": "norms", "norm2": "norms"}


def group_of(name: str) -> Group:
    """Return the group of a parameter by its published name: "norms" are the blocks', with the timestep behind them."""
    parts = name.split(".")
    return _OF_BLOCK[parts[2]] if parts[0] == "transformer_blocks" else _OF_MODEL[parts[0]]


def freeze_all_but(model: nn.Module, groups: Iterable[Group]) -> None:
    """Let the parameters of these groups be trained, and no others."""
    trained = set(groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in trained)
