"""How a model starts: so that its step 0 is its text-to-video base, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from echovideo.errors import WeightsError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.groups import group_of

_PATCHES = "patch_embed.proj.weight"


@torch.no_grad()
def start_as_base(model: EchoVideoTransformer3DModel) -> None:
    """Set what identity goes through so that it does nothing yet: `text_proj` to [0 | I], the face's channels to 0.

    `text_proj` has no residual: from random weights the backbone would have to learn anew what text is.
    """
    face_tokens = model.config.face_seq_length
    model.text_proj.bias.zero_()
    model.text_proj.weight.zero_()
    model.text_proj.weight[:, face_tokens:].fill_diagonal_(1)
    model.patch_embed.proj.weight[:, model.config.out_channels :].zero_()


@torch.no_grad()
def load_base(model: EchoVideoTransformer3DModel, base: Mapping[str, torch.Tensor]) -> None:
    """Fill the backbone from the weights of a CogVideoX text-to-video transformer, then `start_as_base`.

    Its patch embedding knows the noisy latents alone (out_channels); it is widened with zeros. The rest of IITF keeps
    the weights it has. Raises WeightsError naming the tensor that is missing, too many or of another shape.
    """
    places = {name: place for name, place in model.state_dict().items() if group_of(name) != "fusion"}
    odd = sorted(places.keys() ^ base.keys())
    if odd:
        raise WeightsError(f"the base {'lacks' if odd[0] in places else 'has the unknown tensor'} {odd[0]!r}")
    for name, place in places.items():
        target = place[:, : model.config.out_channels] if name == _PATCHES else place
        if target.shape != base[name].shape:
            raise WeightsError(f"the base's {name!r} has shape {tuple(base[name].shape)}, not {tuple(target.shape)}")
        target.copy_(base[name])
    start_as_base(model)
