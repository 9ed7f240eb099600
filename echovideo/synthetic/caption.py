"""What a caption says of a clip: a small grammar, from attributes to English and exactly back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from echovideo.errors import RequestError
from echovideo.hashing import uniform
from echovideo.synthetic.clip import ATTRIBUTES, ClipCondition

_STREAM = 5

_OPENING = "A person"
# Attribute: value: its wordings, in the order a caption says them. No wording has a comma or two meanings.
_PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "pose": {
            "front": ("facing the camera", "looking straight ahead"),
            "left": ("facing left", "looking to the left"),
            "right": ("facing right", "looking to the right"),
            "up": ("holding the head high", "looking upwards"),
            "down": ("holding the head low", "looking downwards"),
        },
        "motion": {
            "still": ("keeping still", "not moving"),
            "turn_left": ("turning the head to the left", "turning left"),
            "turn_right": ("turning the head to the right", "turning right"),
            "nod": ("nodding", "moving the head up and down"),
            "talk": ("talking", "saying something"),
            "approach": ("coming closer", "leaning towards the camera"),
        },
        "expression": {
            "neutral": ("with a calm face", "with a neutral expression"),
            "smile": ("with a smile", "with a friendly smile on the lips"),
            "laugh": ("with a laugh", "with a laughing mouth"),
            "surprise": ("with a surprised look", "with raised brows and an open mouth"),
            "frown": ("with a frown", "with an angry look"),
        },
        "glasses": {
            "none": ("without glasses", "with bare eyes"),
            "round": ("in round glasses", "behind round lenses"),
            "square": ("in square glasses", "behind square lenses"),
        },
        "hair_style": {
            "cropped": ("with cropped hair", "with hair shaved close"),
            "short": ("with short hair", "with hair above the ears"),
            "bob": ("with hair in a bob", "with hair down to the chin"),
            "long": ("with long hair", "with hair over the shoulders"),
            "bun": ("with hair in a bun", "with hair tied up"),
        },
        "hair_colour": {
            "natural": ("with undyed hair", "with hair of a natural colour"),
            "silver": ("with hair dyed silver", "with hair of silver colour"),
            "red": ("with hair dyed bright red", "with hair of bright red colour"),
            "pink": ("with hair dyed pink", "with hair of pink colour"),
            "blue": ("with hair dyed blue", "with hair of blue colour"),
        },
        "garment_colour": {
            "red": ("wearing red", "dressed in red"),
            "blue": ("wearing blue", "dressed in blue"),
            "green": ("wearing green", "dressed in green"),
            "yellow": ("wearing yellow", "dressed in yellow"),
            "white": ("wearing white", "dressed in white"),
            "black": ("wearing black", "dressed in black"),
        },
        "garment": {
            "t_shirt": ("in a plain shirt", "in a T-shirt"),
            "striped": ("in a striped top", "in a top with stripes"),
            "roll_neck": ("in a roll-neck", "in a high collar"),
        },
        "background": {
            "wall": ("before a grey wall", "in a plain studio"),
            "park": ("in a green park", "among trees"),
            "beach": ("on a beach", "by the sea"),
            "night": ("in a city at night", "before the lights of a city"),
            "library": ("in a library", "before shelves of books"),
            "sunset": ("at sunset", "under an evening sky"),
        },
        "light": {
            "front": ("lit from the front", "with light from the camera"),
            "left": ("lit from the left", "with light from the left side"),
            "right": ("lit from the right", "with light from the right side"),
            "above": ("lit from above", "with light from overhead"),
        },
        "light_colour": {
            "white": ("in white light", "in neutral light"),
            "warm": ("in warm light", "in golden light"),
            "cool": ("in cool light", "in bluish light"),
        },
    }
)
OMITTED_SHARE = 0.25
"""How often a caption leaves an attribute out."""


def caption(condition: ClipCondition, *, seed: int, omitted_share: float = OMITTED_SHARE) -> str:
    """Return a caption of the clip; `seed` chooses the wording and which attributes are left out.

    The words say what the person does, wears and is seen in, and nothing of who it is.
    """
    draws = uniform(torch.tensor([seed]), 2 * len(ATTRIBUTES), _STREAM)[0].tolist()
    said = []
    for number, (name, phrases) in enumerate(_PHRASES.items()):
        wording = phrases[condition.attributes()[name]]
        if draws[2 * number] >= omitted_share:
            said.append(wording[int(draws[2 * number + 1] * len(wording))])
    return f"{_OPENING} {', '.join(said)}".rstrip() + "."


def read_caption(text: str) -> dict[str, str]:
    """Return the attributes that a caption states, and their values; what it leaves out is not in the answer.

    Raises RequestError for text outside the grammar.
    """
    if not (text.startswith(_OPENING) and text.endswith(".")):
        raise RequestError(f"caption {text!r} does not begin with {_OPENING!r} and end with a full stop")
    said = text.removeprefix(_OPENING).removesuffix(".").strip()
    attributes: dict[str, str] = {}
    for phrase in said.split(", ") if said else ():
        if phrase not in _MEANINGS:
            raise RequestError(f"caption {text!r}: no attribute is worded {phrase!r}")
        name, value = _MEANINGS[phrase]
        if name in attributes:
            raise RequestError(f"caption {text!r} states {name} twice")
        attributes[name] = value
    return attributes


_MEANINGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        phrase: (name, value)
        for name, values in _PHRASES.items()
        for value, wording in values.items()
        for phrase in wording
    }
)
