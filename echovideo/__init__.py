"""EchoVideo: videos of one person, from a photo and a prompt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echovideo.model.fusion import IdentityImageTextFusion
    from echovideo.model.transformer import EchoVideoTransformer3DModel
    from echovideo.pipeline import EchoVideoPipeline

__all__ = ["EchoVideoPipeline", "EchoVideoTransformer3DModel", "IdentityImageTextFusion"]

_HOMES = {
    "EchoVideoPipeline": "echovideo.pipeline",
    "EchoVideoTransformer3DModel": "echovideo.model.transformer",
    "IdentityImageTextFusion": "echovideo.model.fusion",
}


def __getattr__(name: str) -> Any:
    # The names are looked up on first use: a command line that only reads a ledger need not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'echovideo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
