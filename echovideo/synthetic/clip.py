"""What happens in a clip: attributes that a caption can say, and the per-frame curves they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import Tensor

from echovideo.errors import RequestError
from echovideo.hashing import uniform

_STREAM = 2

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pose": ("front", "left", "right", "up", "down"),
        "motion": ("still", "turn_left", "turn_right", "nod", "talk", "approach"),
        "expression": ("neutral", "smile", "laugh", "surprise", "frown"),
        "light": ("front", "left", "right", "above"),
        "light_colour": ("white", "warm", "cool"),
        "hair_style": ("cropped", "short", "bob", "long", "bun"),
        "hair_colour": ("natural", "silver", "red", "pink", "blue"),
        "glasses": ("none", "round", "square"),
        "garment": ("t_shirt", "striped", "roll_neck"),
        "garment_colour": ("red", "blue", "green", "yellow", "white", "black"),
        "background": ("wall", "park", "beach", "night", "library", "sunset"),
    }
)
"""Each attribute of a clip and its values. Left and right are the picture's."""

_NUISANCES = (
    "yaw",
    "pitch",
    "roll",
    "shift_x",
    "shift_y",
    "zoom",
    "amount",
    "phase",
    "light_side",
    "light_height",
    "exposure",
    "ambient",
    "parting",
    "fringe",
    "gaze_x",
    "gaze_y",
    "backdrop",
    "frame_colour",
)
CURVES: tuple[str, ...] = (
    *("yaw", "pitch", "roll", "shift_x", "shift_y", "zoom"),
    *("smile", "frown", "mouth_open", "mouth_round", "brow_raise", "blink", "gaze_x", "gaze_y"),
    *(f"turn_{entry}" for entry in range(9)),
    *("body_cosine", "body_sine"),
    *("light_x", "light_y", "light_z", "key", "ambient", "parting", "fringe", "backdrop", "frame_colour"),
    *(
        f"{name}:{value}"
        for name in ("light_colour", "hair_style", "hair_colour", "glasses", "garment", "garment_colour", "background")
        for value in ATTRIBUTES[name]
    ),
)
"""Names of the scene tensor's columns: angles in degrees, the rest as `scene_curves` makes them."""

MAX_YAW_DEGREES = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipCondition:
    """What one clip shows besides who is in it: a value of each of ATTRIBUTES.

    `seed` decides what no caption says: exact angles, distance, position, strength of light, parting, gaze.
    Raises RequestError for a value that is not one of the attribute's.
    """

    seed: int
    pose: str = "front"
    motion: str = "still"
    expression: str = "neutral"
    light: str = "front"
    light_colour: str = "white"
    hair_style: str = "short"
    hair_colour: str = "natural"
    glasses: str = "none"
    garment: str = "t_shirt"
    garment_colour: str = "white"
    background: str = "wall"

    def __post_init__(self) -> None:
        for name, value in self.attributes().items():
            if value not in ATTRIBUTES[name]:
                raise RequestError(f"{name} {value!r} is not one of {', '.join(ATTRIBUTES[name])}")

    def attributes(self) -> dict[str, str]:
        """Return each attribute's value, without the seed."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}


def sample_conditions(seeds: Sequence[int]) -> list[ClipCondition]:
    """Return a condition for each seed, every attribute uniform over its values and independent of the others."""
    draws = uniform(torch.tensor(list(seeds), dtype=torch.int64), len(ATTRIBUTES), _STREAM + 1).tolist()
    return [
        ClipCondition(
            seed=seed,
            **{
                name: values[int(draw * len(values))]
                for (name, values), draw in zip(ATTRIBUTES.items(), row, strict=True)
            },
        )
        for seed, row in zip(seeds, draws, strict=True)
    ]


def scene_curves(conditions: Sequence[ClipCondition], frames: int, *, reference: bool = False) -> Tensor:
    """Return the scene tensor (B, frames, len(CURVES)) float32: each condition's curves over its frames.

    `reference` leaves out every nuisance: the camera straight ahead, the strength of each attribute its mean.
    """
    seeds = torch.tensor([condition.seed for condition in conditions], dtype=torch.int64)
    draws = uniform(seeds, len(_NUISANCES), _STREAM)
    if reference:
        draws = torch.full_like(draws, 0.5)
    # Each (B, 1), from -1 to 1; times along the clip (1, frames), from 0 to 1.
    nuisance = {name: column[:, None] * 2 - 1 for name, column in zip(_NUISANCES, draws.unbind(1), strict=True)}
    time = torch.linspace(0, 1, frames)[None] if frames > 1 else torch.zeros(1, 1)
    chosen = [condition.attributes() for condition in conditions]

    def has(name: str, value: str) -> Tensor:
        return torch.tensor([[float(row[name] == value)] for row in chosen])

    eased = time * time * (3 - 2 * time)
    cycle = 2 * math.pi * time
    amount = 1 + 0.12 * nuisance["amount"]
    phase = nuisance["phase"] * math.pi

    turn = (has("motion", "turn_right") - has("motion", "turn_left")) * amount
    side = has("pose", "right") - has("pose", "left")
    # A turn starts on its far side, so that all of it is seen.
    yaw = side * (17 + 4 * nuisance["yaw"]) + (1 - side.abs()) * 5 * nuisance["yaw"] + turn * (26 * eased - 9)
    yaw = MAX_YAW_DEGREES * torch.tanh(yaw / MAX_YAW_DEGREES) * 1.12
    nod = has("motion", "nod") * amount * torch.sin(2 * cycle)
    lift = has("pose", "up") - has("pose", "down")
    pitch = lift * (7.5 + 1.5 * nuisance["pitch"]) + (1 - lift.abs()) * 2.5 * nuisance["pitch"] + 6.5 * nod
    sway = 1.2 * torch.sin(cycle + phase)

    talk = has("motion", "talk") * (0.5 + 0.5 * torch.sin(3.2 * cycle + phase)) * amount
    smile = 0.62 * has("expression", "smile") + 0.7 * has("expression", "laugh")
    surprise = has("expression", "surprise")
    # One blink in about half of the clips, three frames of seventeen long.
    blink = (1 - ((time - 0.5 - 0.45 * nuisance["gaze_y"]) / 0.085).abs()).clamp(min=0) * (nuisance["phase"] > 0)

    yaw = yaw.clamp(-MAX_YAW_DEGREES, MAX_YAW_DEGREES) + 0.4 * sway
    pitch = pitch + 0.3 * sway
    roll = 4 * nuisance["roll"] + 0.5 * sway
    # The shoulders follow a turn of the head a little.
    body_angle = torch.deg2rad(0.3 * yaw)

    light_side = has("light", "right") - has("light", "left")
    light_x = 0.85 * light_side + 0.18 * nuisance["light_side"]
    light_y = -0.45 - 0.15 * nuisance["light_height"] - 0.70 * has("light", "above")
    light_z = 1.0 - 0.25 * light_side.abs() - 0.35 * has("light", "above")
    light_size = torch.sqrt(light_x**2 + light_y**2 + light_z**2)
    columns = {
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
        **{f"turn_{number}": entry for number, entry in enumerate(_rotation(yaw, pitch, roll))},
        "body_cosine": torch.cos(body_angle),
        "body_sine": torch.sin(body_angle),
        "shift_x": 0.08 * nuisance["shift_x"] + 0.012 * sway,
        "shift_y": 0.06 * nuisance["shift_y"],
        "zoom": (0.34 + 0.012 * nuisance["zoom"]) * (1 + has("motion", "approach") * (0.24 * eased - 0.08)),
        "smile": smile * (0.9 + 0.1 * torch.sin(cycle + phase)) * amount,
        "frown": 0.62 * has("expression", "frown") * amount,
        "mouth_open": (0.24 * has("expression", "laugh") + 0.22 * surprise) * amount + 0.26 * talk,
        "mouth_round": 0.85 * surprise,
        "brow_raise": 0.65 * surprise * amount + 0.1 * smile - 0.5 * has("expression", "frown") * amount,
        "blink": blink,
        "gaze_x": 0.25 * nuisance["gaze_x"] - 0.016 * yaw,
        "gaze_y": 0.2 * nuisance["gaze_y"] + 0.012 * pitch,
        "light_x": light_x / light_size,
        "light_y": light_y / light_size,
        "light_z": light_z / light_size,
        "key": 1 + 0.14 * nuisance["exposure"],
        "ambient": 1 + 0.2 * nuisance["ambient"],
        "parting": nuisance["parting"],
        "fringe": nuisance["fringe"],
        "backdrop": nuisance["backdrop"],
        "frame_colour": nuisance["frame_colour"],
    }
    columns |= {name: has(*name.split(":")) for name in CURVES if ":" in name}
    shape = len(conditions), frames
    return torch.stack([columns[name].expand(shape) for name in CURVES], dim=2)


def _rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> tuple[Tensor, ...]:
    """Return the head's rotation, nine entries row by row: pitch up, then yaw to the right, then roll clockwise."""
    cos_y, sin_y = torch.cos(torch.deg2rad(yaw)), torch.sin(torch.deg2rad(yaw))
    cos_p, sin_p = torch.cos(torch.deg2rad(pitch)), torch.sin(torch.deg2rad(pitch))
    cos_r, sin_r = torch.cos(torch.deg2rad(roll)), torch.sin(torch.deg2rad(roll))
    return (
        cos_r * cos_y,
        cos_r * sin_y * sin_p - sin_r * cos_p,
        cos_r * sin_y * cos_p + sin_r * sin_p,
        sin_r * cos_y,
        sin_r * sin_y * sin_p + cos_r * cos_p,
        sin_r * sin_y * cos_p - cos_r * sin_p,
        -sin_y,
        cos_y * sin_p,
        cos_y * cos_p,
    )
