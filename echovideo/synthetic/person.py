"""Who a drawn person is: named identity parameters, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from echovideo.hashing import uniform

_STREAM = 1

SPLITS: Mapping[str, range] = MappingProxyType(
    {
        "train": range(0, 1_000_000),
        "judge": range(1_000_000, 2_000_000),
        "validation": range(2_000_000, 2_100_000),
        "test": range(2_100_000, 2_200_000),
    }
)
"""Seeds of the people that may be used for each purpose. No person is in two of them."""

# Name: mean, half range, loading on sturdiness (narrow and soft to broad and heavy). Lengths in 10 cm.
_SHAPE: Mapping[str, tuple[float, float, float]] = {
    "head_width": (0.75, 0.057, 0.2),
    "face_width": (0.600, 0.083, 0.3),
    "face_depth": (0.69, 0.034, 0.0),
    "forehead": (-0.70, 0.12, 0.0),
    "chin_y": (1.10, 0.161, 0.3),
    "chin_width": (0.17, 0.069, 0.5),
    "chin_forward": (0.41, 0.057, 0.3),
    "jaw_width": (0.30, 0.081, 0.5),
    "jaw_y": (0.66, 0.081, 0.0),
    "cheekbone": (0.05, 0.069, -0.2),
    "cheek_hollow": (0.015, 0.052, 0.0),
    "brow_ridge": (0.045, 0.057, 0.6),
    "eye_x": (0.325, 0.057, 0.0),
    "eye_width": (0.155, 0.03, -0.2),
    "eye_height": (0.077, 0.034, -0.3),
    "eye_tilt": (0.04, 0.276, -0.2),
    "eye_depth": (0.085, 0.034, 0.2),
    "lid_crease": (0.5, 0.5, 0.0),
    "brow_y": (-0.205, 0.069, 0.35),
    "brow_thickness": (0.038, 0.03, 0.5),
    "brow_arch": (0.045, 0.057, -0.3),
    "brow_tilt": (0.0, 0.184, 0.0),
    "brow_length": (0.235, 0.04, 0.0),
    "nose_y": (0.45, 0.138, 0.2),
    "nose_width": (0.125, 0.071, 0.3),
    "nose_forward": (0.88, 0.08, 0.2),
    "nose_bridge": (0.075, 0.04, 0.2),
    "nose_tip": (0.105, 0.038, 0.3),
    "nose_up": (0.0, 0.081, -0.2),
    "mouth_y": (0.735, 0.078, 0.1),
    "mouth_width": (0.255, 0.071, 0.2),
    "upper_lip": (0.062, 0.046, -0.3),
    "lower_lip": (0.080, 0.046, -0.2),
    "cupid_bow": (0.5, 0.5, 0.0),
    "ear_size": (0.24, 0.04, 0.2),
    "skew": (0.0, 0.034, 0.0),
}
# Everything else, each from 0 to 1 unless said.
_COLOUR = (
    "melanin",
    "undertone",
    "blush",
    "freckles",
    "iris_tone",
    "iris_hue",
    "lip_colour",
    "hair_tone",
    "hair_red",
    "hair_grey",
    "curl",
    "beard",
    "moustache",
    "age_lines",
    "makeup",
)
_MOLES = tuple(f"mole_{number}_{what}" for number in range(3) for what in ("x", "y", "size"))

PARAMETERS: tuple[str, ...] = (*_SHAPE, *_COLOUR, *_MOLES)
"""Names of the identity parameters, in the order of an identity tensor's columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One drawn person: the seed that names it and its identity parameters, in the order of PARAMETERS.

    Lengths are in units of 10 cm on a head about 2.3 high, eyes at height 0, y down and z towards the camera; colours
    and amounts run from 0 to 1. `melanin` is the skin tone, 0 the lightest and 1 the darkest.
    """

    seed: int
    parameters: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.parameters) == len(PARAMETERS)

    def __getitem__(self, name: str) -> float:
        return self.parameters[PARAMETERS.index(name)]


def people(seeds: Sequence[int]) -> list[Person]:
    """Return the people that the seeds name; take seeds from SPLITS."""
    rows = identity_parameters(torch.tensor(list(seeds), dtype=torch.int64))
    return [Person(seed=seed, parameters=tuple(row)) for seed, row in zip(seeds, rows.tolist(), strict=True)]


def identity_parameters(seeds: Tensor) -> Tensor:
    """Return the identity tensor of int64 seeds (B,): float32 (B, len(PARAMETERS)), on the seeds' device."""
    draws = uniform(seeds, 2 + len(PARAMETERS), _STREAM)
    sturdy = draws[:, 0] * 2 - 1
    own = dict(zip(PARAMETERS, draws[:, 2:].unbind(1), strict=True))
    values: dict[str, Tensor] = {}
    for name, (mean, half_range, loading) in _SHAPE.items():
        spread = (1 - abs(loading)) * (own[name] * 2 - 1) + loading * sturdy
        # Pushed towards the ends of the range: people differ more than with an even spread over the same range.
        values[name] = mean + half_range * spread.sign() * spread.abs() ** 0.6

    melanin = own["melanin"]
    # Only lighter skin comes with light eyes and hair often; coils come with darker skin more often. None is ruled out.
    lightness = (1 - melanin) ** 1.3
    values |= {name: own[name] for name in ("melanin", "undertone", "blush", "iris_hue", "lip_colour")}
    values["freckles"] = (own["freckles"] * 2.2 - 1.2).clamp(min=0) * (1 - 0.45 * melanin)
    values["iris_tone"] = own["iris_tone"] * (0.12 + 0.88 * lightness)
    values["hair_tone"] = 1 - (0.04 + 0.96 * lightness) * own["hair_tone"]
    values["hair_red"] = own["hair_red"] ** 2 * (0.15 + 0.85 * lightness)
    values["hair_grey"] = (own["hair_grey"] * 5 - 4).clamp(min=0)
    values["curl"] = (own["curl"] * 1.15 - 0.27 + 0.3 * melanin).clamp(0, 1)
    bearded = ((sturdy - 0.05) * 2.5).clamp(0, 1)
    values["beard"] = bearded * (own["beard"] * 1.8 - 0.8).clamp(min=0)
    values["moustache"] = torch.maximum(values["beard"], bearded * (own["moustache"] * 2.5 - 1.5).clamp(min=0))
    values["age_lines"] = (own["age_lines"] * 1.4 - 0.4).clamp(min=0)
    values["makeup"] = (own["makeup"] * 1.6 - 0.6 - sturdy.clamp(min=-0.2)).clamp(0, 1)
    for number in range(3):
        values[f"mole_{number}_x"] = (own[f"mole_{number}_x"] - 0.5) * 1.0
        values[f"mole_{number}_y"] = own[f"mole_{number}_y"] * 1.3 - 0.45
        size = own[f"mole_{number}_size"]
        values[f"mole_{number}_size"] = torch.where(size > 0.6, 0.022 + 0.03 * (size - 0.6), 0.0)
    return torch.stack([values[name] for name in PARAMETERS], dim=1)
