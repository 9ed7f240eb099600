"""The shapes of a person as signed distances: head, hair and body, and where the five face points lie on them.

Lengths are 10 cm; x to the right of the picture, y down, z towards the camera; the head's eyes lie at y = 0. All
functions work on coordinates of one broadcast shape; `person` and `scene` hold columns of the identity and scene
tensors, shaped to broadcast against them. Primitives and smooth unions follow Inigo Quilez's articles on distance
functions (iquilezles.org).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Columns = Mapping[str, Tensor]
Point = tuple[Tensor, Tensor, Tensor]


def smooth_step(value: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return 0 below `low`, 1 above `high` (or the reverse if `low` is the larger) and a smooth ramp between."""
    ramp = ((value - low) * (1 / (high - low))).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def bell(square: Tensor) -> Tensor:
    """Return about exp(-square / 2), exactly 0 from 8 on: a polynomial, as it is wanted hundreds of times a pixel."""
    rest = (1 - 0.125 * square).clamp(min=0)
    rest = rest * rest
    return rest * rest


def bump(x: Tensor, y: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """Return a bell of the given deviations, 1 at the origin."""
    u, v = x * (1 / width), y * (1 / height)
    return bell(u * u + v * v)


def ridge(x: Tensor, width: float | Tensor) -> Tensor:
    """Return a bell of one coordinate."""
    u = x * (1 / width)
    return bell(u * u)


def smooth_union(first: Tensor, second: Tensor, blend: float) -> Tensor:
    """Return the union of two distances with a fillet `blend` wide."""
    overlap = (blend - (first - second).abs()).clamp(min=0)
    return torch.minimum(first, second) - overlap * overlap / (4 * blend)


def mouth_line(person: Columns, scene: Columns, across: Tensor) -> Tensor:
    """Return the height at which the lips meet, `across` being -1 and 1 in the corners."""
    raised = 0.02 + 0.10 * scene["smile"] - 0.075 * scene["frown"]
    return person["mouth_y"] - 0.02 * scene["smile"] + raised * (0.25 - across * across)


def mouth_half_width(person: Columns, scene: Columns) -> Tensor:
    """Return half the distance between the mouth's corners."""
    wide: Tensor = person["mouth_width"] * (1 + 0.14 * scene["smile"] - 0.18 * scene["mouth_round"])
    return wide


def mouth_gap(scene: Columns) -> tuple[Tensor, Tensor]:
    """Return how far the upper and the lower lip are from the mouth line in its middle."""
    opened = scene["mouth_open"]
    return 0.035 * opened, (0.11 + 0.06 * scene["mouth_round"]) * opened


def head_distance(person: Columns, scene: Columns, point: Point) -> Tensor:
    """Return the signed distance of points in head coordinates to the face, cranium and ears."""
    x, y, z = point
    side = torch.sqrt(x * x + 4e-4)
    jaw_drop = 0.06 * scene["mouth_open"]
    below = smooth_step(y, 0.5, 1.0)
    y_jaw = y - jaw_drop * below

    cranium = _ellipsoid(x, y + 0.28, z + 0.22, person["head_width"], 0.86, 0.90)
    face = _ellipsoid(x, y_jaw - 0.25, z + 0.03, person["face_width"], person["chin_y"] - 0.27, person["face_depth"])
    jaw = _ellipsoid(side - person["jaw_width"], y_jaw - person["jaw_y"], z + 0.02, 0.17, 0.22, 0.38)
    chin = _ellipsoid(
        x, y_jaw - person["chin_y"] + 0.16, z - person["chin_forward"] + 0.02, person["chin_width"], 0.15, 0.16
    )
    distance = smooth_union(cranium, face, 0.22)
    distance = smooth_union(distance, jaw, 0.20)
    distance = smooth_union(distance, chin, 0.20)

    front = smooth_step(z, -0.15, 0.35)
    eye_side = side - person["eye_x"]
    across = x / mouth_half_width(person, scene)
    inside_mouth = bell((across * across * 1.8) * (across * across * 1.8))
    from_line = y - mouth_line(person, scene, across.clamp(-1.3, 1.3))
    upper_gap, lower_gap = mouth_gap(scene)
    lips = (
        0.045 * ridge(from_line + upper_gap + 0.6 * person["upper_lip"], 0.6 * person["upper_lip"])
        + 0.055 * ridge(from_line - lower_gap - 0.6 * person["lower_lip"], 0.6 * person["lower_lip"])
        - 0.020 * ridge(from_line, 0.025 + lower_gap)
    )
    relief = (
        person["brow_ridge"] * bump(side - 0.25, y + 0.17, 0.20, 0.075)
        - person["eye_depth"] * bump(eye_side, y - 0.01, 0.17, 0.11)
        - 0.045 * bump(side - 0.14, y, 0.06, 0.10)
        + 0.055 * bump(eye_side, y, 0.11, 0.075)
        + person["cheekbone"] * bump(side - 0.42, y - 0.30, 0.14, 0.13)
        + 0.035 * scene["smile"] * bump(side - 0.36, y - 0.40, 0.12, 0.11)
        - person["cheek_hollow"] * bump(side - 0.42, y - 0.66, 0.12, 0.16)
        + 0.06 * bump(x, y - person["mouth_y"], 0.20, 0.17)
        + inside_mouth * lips
        - 0.03 * bump(x, y_jaw - person["mouth_y"] - 0.165, 0.16, 0.04)
        - 0.012 * bump(x, y - 0.5 * (person["nose_y"] + 0.06 + person["mouth_y"]), 0.03, 0.06)
        - (0.012 + 0.018 * person["age_lines"] + 0.012 * scene["smile"]) * _fold(person, scene, side, y)
    )
    distance = distance - 0.85 * front * relief

    shifted = x - person["skew"] * smooth_step(y, -0.1, 0.45)
    return smooth_union(distance, _nose(person, shifted, y, z), 0.15)


def ear_distance(person: Columns, point: Point) -> Tensor:
    """Return the signed distance to the two ears."""
    x, y, z = point
    side = x.abs()
    lean = side - person["head_width"] - 0.01 + 0.25 * (y - 0.1)
    return _ellipsoid(lean, y - 0.08, z + 0.20 - 0.3 * (y - 0.08), 0.085, person["ear_size"], 0.14)


def hair_distance(person: Columns, scene: Columns, point: Point) -> Tensor:
    """Return the signed distance to the hair, positive everywhere on a bald head's face."""
    x, y, z = point
    side = torch.sqrt(x * x + 1e-4)
    curl = person["curl"]
    cropped, short = scene["hair_style:cropped"], scene["hair_style:short"]
    bob, long, bun = scene["hair_style:bob"], scene["hair_style:long"], scene["hair_style:bun"]
    falling = bob + long

    # Negative inside the hair line: over the forehead, and behind a line down the temples.
    swept = x * torch.sign(scene["parting"] + 1e-3)
    fringe = (0.16 * scene["fringe"] + 0.02) * (short + falling) * (1 - 0.6 * curl)
    brow_side = person["forehead"] + 0.16 * (side / 0.5) ** 2 + fringe * smooth_step(swept, 0.55, -0.5)
    temple = 0.30 + 0.12 * falling - (0.42 - 0.30 * falling) * smooth_step(y, -0.35, 0.25)
    temple = temple - (0.9 - 0.6 * falling) * smooth_step(y, 0.18, 0.5)
    line = -smooth_union(-(brow_side - y), -(temple - z), 0.12)
    line = line + 0.02 * torch.sin(37 * x + 5 * z) * torch.sin(29 * y + 11 * x)
    inside = smooth_step(line, -0.02, 0.05)
    risen = smooth_step(line, -0.02, 0.42 - 0.25 * curl)

    cranium = _ellipsoid(x, y + 0.28, z + 0.22, person["head_width"], 0.86, 0.90)
    volume = 0.03 * cropped + (0.10 + 0.26 * curl * curl) * short + (0.10 + 0.10 * curl) * falling + 0.05 * bun
    top = smooth_step(y, 0.0, -0.7)
    thickness = volume * (0.55 + 0.45 * top) * (0.25 + 0.75 * risen) + 0.02
    cap = cranium - thickness * inside + 0.06 * (1 - inside)

    wave = 0.05 * curl * torch.sin(7 * y + 2 * scene["fringe"] + 3 * z) + 0.02 * torch.sin(3.5 * y + x)
    end = 0.72 * bob + 1.35 * long
    wide = person["head_width"]
    lock = _cone(
        side - wide + 0.02 + wave, y + 0.30, z - 0.02, 0.06, end + 0.25, -0.04, 0.16, 0.15 + 0.09 * curl + 0.05 * bob
    )
    back = _ellipsoid(x + 0.5 * wave, y - 0.5 * end + 0.25, z + 0.50, wide + 0.06 + 0.12 * curl, 0.5 * end + 0.62, 0.46)
    fall = smooth_union(lock, back, 0.12) + 9 * (1 - falling)
    knot = _ellipsoid(x, y + 1.16, z + 0.42, 0.30 + 0.06 * curl, 0.26 + 0.05 * curl, 0.28) + 9 * (1 - bun)
    hair = smooth_union(smooth_union(cap, fall, 0.10), knot, 0.06)

    grain = torch.sin(15 * x + 2 * y) * torch.sin(14 * y + 3 * z) * torch.sin(15 * z + x)
    return hair - 0.06 * curl * (1 - 0.7 * cropped - 0.5 * bun) * grain * inside.clamp(min=0.35)


def body_distance(scene: Columns, point: Point) -> Tensor:
    """Return the signed distance of points in body coordinates to the neck and shoulders, clothes included."""
    x, y, z = point
    roll_neck = scene["garment:roll_neck"]
    neck = torch.sqrt(x * x + (1.1 * (z + 0.30 + 0.08 * y)) ** 2) - 0.37 - 0.07 * smooth_step(y, 1.0, 1.6)
    neck = torch.maximum(neck, 0.3 - y) - 0.055 * roll_neck * smooth_step(y, 1.13, 1.19)
    shoulders = _ellipsoid(x, y - 2.55, z + 0.42, 1.50, 1.02, 0.62)
    return smooth_union(neck, shoulders, 0.38) - 0.025 * clothed(scene, point)


def clothed(scene: Columns, point: Point) -> Tensor:
    """Return how much of the body's surface is covered by cloth, 0 to 1, at points in body coordinates."""
    x, y, z = point
    roll_neck = scene["garment:roll_neck"]
    collar = 1.50 - 0.35 * x * x - 0.12 * smooth_step(z, 0.2, -0.5) - 0.31 * roll_neck
    return smooth_step(y, collar - 0.015, collar + 0.015)


def landmark_columns(person: Columns, scene: Columns) -> tuple[Tensor, Tensor]:
    """Return x and y, head coordinates, of the five points in the last axis; they lie where z meets the skin.

    The order is the detectors': eye, eye, nose tip, mouth corner, mouth corner, the picture's left one first.
    """
    half = mouth_half_width(person, scene)
    corner = mouth_line(person, scene, torch.ones_like(half))
    zero = torch.zeros_like(half)
    x = torch.cat((zero - person["eye_x"], zero + person["eye_x"], zero + person["skew"], -half, half), dim=-1)
    return x, torch.cat((zero, zero, zero + _tip_height(person), corner, corner), dim=-1)


def _tip_height(person: Columns) -> Tensor:
    return person["nose_y"] - 0.07 - person["nose_up"]


def _nose(person: Columns, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    tip_y = _tip_height(person)
    bridge = _cone(
        x,
        y + 0.08,
        z - 0.60,
        0.0,
        tip_y + 0.08,
        person["nose_forward"] - person["nose_tip"] - 0.60,
        person["nose_bridge"],
        person["nose_tip"] * 0.9,
    )
    tip = torch.sqrt(x * x + (y - tip_y) ** 2 + (z - person["nose_forward"] + person["nose_tip"]) ** 2)
    side = torch.sqrt(x * x + 1e-4)
    ala = _ellipsoid(side - person["nose_width"] + 0.055, y - person["nose_y"], z - 0.66, 0.07, 0.068, 0.11)
    return smooth_union(smooth_union(bridge, tip - person["nose_tip"], 0.08), ala, 0.09)


def _fold(person: Columns, scene: Columns, side: Tensor, y: Tensor) -> Tensor:
    """Return a ridge from the wing of the nose to beside the mouth's corner."""
    top = person["nose_y"] - 0.02
    length = person["mouth_y"] - top + 0.02
    along = (y - top) / length
    start = person["nose_width"] + 0.05
    offset = side - start - (mouth_half_width(person, scene) + 0.07 - start) * along.clamp(0, 1.2)
    return bump(offset, along - 0.45, 0.035, 0.45)


def _ellipsoid(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    width: float | Tensor,
    height: float | Tensor,
    depth: float | Tensor,
) -> Tensor:
    """Return the approximate distance to an ellipsoid of these half axes around the origin."""
    per_width, per_height, per_depth = 1 / width, 1 / height, 1 / depth
    u, v, w = x * per_width, y * per_height, z * per_depth
    squared = u * u + v * v + w * w + 1e-6
    u, v, w = u * per_width, v * per_height, w * per_depth
    return (squared - torch.sqrt(squared)) * torch.rsqrt(u * u + v * v + w * w + 1e-6)


def _cone(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    end_x: float | Tensor,
    end_y: float | Tensor,
    end_z: float | Tensor,
    radius: float | Tensor,
    end_radius: float | Tensor,
) -> Tensor:
    """Return the approximate distance to a rounded cone from the origin to the end point."""
    along = (x * end_x + y * end_y + z * end_z) / (end_x * end_x + end_y * end_y + end_z * end_z)
    along = along.clamp(0, 1)
    off = torch.sqrt((x - along * end_x) ** 2 + (y - along * end_y) ** 2 + (z - along * end_z) ** 2 + 1e-6)
    return off - radius - along * (end_radius - radius)
