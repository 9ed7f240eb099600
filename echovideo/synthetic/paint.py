"""The colours of a person's surface and of what is behind, in linear RGB."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from echovideo.hashing import hashed
from echovideo.synthetic.head import (
    Columns,
    Point,
    bump,
    clothed,
    mouth_gap,
    mouth_half_width,
    mouth_line,
    ridge,
    smooth_step,
)

Palette = Mapping[str, Tensor]

# sRGB, as artists write them.
_COLOURS: Mapping[str, str] = {
    **{f"skin{i}": code for i, code in enumerate(("f5d7c4", "e9bf9f", "cb9a74", "a6714d", "7d4f35", "573425"))},
    **{f"hair{i}": code for i, code in enumerate(("e6c68c", "b98a50", "7a4d2b", "42281a", "17110f"))},
    **{"copper": "a8431f", "grey": "bdbab6"},
    **{"iris_dark": "2a150c", "iris_amber": "7d5a28", "iris_green": "6f9258", "iris_blue": "5a93c4"},
    **{"hair_colour:silver": "ccd0d8", "hair_colour:red": "c01f1a", "hair_colour:pink": "ee6fae"},
    **{"hair_colour:blue": "2b63dd", "rose": "b8324a", "sclera": "ece7e2", "teeth": "f2ede4", "mouth": "3a1012"},
    **{"garment_colour:red": "c22b2b", "garment_colour:blue": "2f55b5", "garment_colour:green": "2f8a4c"},
    **{"garment_colour:yellow": "e6b92f", "garment_colour:white": "e8e6e1", "garment_colour:black": "22232a"},
    **{"light_colour:white": "ffffff", "light_colour:warm": "ffdcb0", "light_colour:cool": "c3d8ff"},
    **{"frame": "2b2320", "gold": "9a7434", "shadow": "2a1410"},
    **{"wall_top": "b9b4ac", "wall_bottom": "8f8a84", "leaf": "4f8a3c", "leaf_dark": "2c5a2c", "sky": "a9d3f2"},
    **{"sky_high": "5aa2e0", "sea": "2f7fa6", "sand": "dcc59a", "night": "141a33", "night_low": "2c2a4a"},
    **{"lamp_warm": "ffc46b", "lamp_cool": "7fb8ff", "wood": "5a3a22", "book_red": "8a3030", "book_blue": "2f4a70"},
    **{"book_tan": "b08a55", "dusk_high": "4a3f7a", "dusk": "f08a4b", "dusk_low": "f6c667", "hill": "2c2438"},
}


def palette(like: Tensor) -> dict[str, Tensor]:
    """Return each named colour as linear RGB, (1, 1, 3, 1, 1), on the device and of the type of `like`."""
    codes = [[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in _COLOURS.values()]
    table = linear(torch.tensor(codes, device=like.device, dtype=like.dtype)).view(-1, 1, 1, 3, 1, 1)
    return dict(zip(_COLOURS, table.unbind(0), strict=True))


def linear(srgb: Tensor) -> Tensor:
    """Return sRGB values, 0 to 1, as linear light (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def srgb(light: Tensor) -> Tensor:
    """Return linear light, 0 to 1, as sRGB values."""
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light.clamp(min=1e-6) ** (1 / 2.4) - 0.055)


def mix(first: Tensor, second: Tensor, amount: Tensor | float) -> Tensor:
    """Return the colour between two, `amount` 0 giving the first and 1 the second."""
    return first + (second - first) * amount


def skin_colour(person: Columns, colours: Palette) -> Tensor:
    """Return the person's skin, (B, 1, 3, 1, 1): the palette's stops, a little redder or yellower by undertone."""
    tone = _between([colours[f"skin{i}"] for i in range(6)], person["melanin"])
    tilt = (person["undertone"] - 0.5) * torch.tensor([-0.06, 0.02, 0.22], device=tone.device).view(1, 1, 3, 1, 1)
    return tone * (1 + tilt)


def natural_hair_colour(person: Columns, colours: Palette) -> Tensor:
    """Return the colour of brows, beard and undyed hair, (B, 1, 3, 1, 1)."""
    hair = _between([colours[f"hair{i}"] for i in range(5)], person["hair_tone"])
    hair = mix(hair, colours["copper"] * (1.1 - 0.8 * person["hair_tone"]), 0.8 * person["hair_red"])
    return mix(hair, colours["grey"], 0.9 * person["hair_grey"])


def light_colour(scene: Columns, colours: Palette) -> Tensor:
    """Return the colour of the light, (B, F, 3, 1, 1)."""
    total = torch.zeros_like(colours["light_colour:white"])
    for name in ("light_colour:white", "light_colour:warm", "light_colour:cool"):
        total = total + colours[name] * scene[name]
    return total


def paint_hair(person: Columns, scene: Columns, colours: Palette, point: Point) -> Tensor:
    """Return the hair's colour with its strands at points in head coordinates."""
    base = natural_hair_colour(person, colours) * scene["hair_colour:natural"]
    for name in ("hair_colour:silver", "hair_colour:red", "hair_colour:pink", "hair_colour:blue"):
        base = base + colours[name] * scene[name]
    x, y, z = point
    curl = person["curl"]
    along = x + 0.35 * z + 0.05 * curl * torch.sin(9 * y)
    strands = torch.sin(31 * along + 3 * z) + 0.7 * torch.sin(53 * along + 2 * y) + 0.5 * torch.sin(17 * z + 11 * x)
    coils = torch.sin(26 * x + 3 * y) * torch.sin(25 * y) + torch.sin(27 * z + 5 * x) * torch.sin(23 * y + 8 * x)
    texture = (1 - curl) * strands * 0.30 + curl * coils * 0.42
    return base * (0.9 + 0.5 * texture).clamp(min=0.35)


def paint_face(
    person: Columns,
    scene: Columns,
    colours: Palette,
    point: Point,
    pixel: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is painted on the head at points in head coordinates: colour, gloss and how much of it is eyeball.

    `pixel` is a pixel's size in the units of the coordinates: edges are that soft.
    """
    x, y, z = point
    soft = 0.6 * pixel
    side = x.abs()
    front = smooth_step(z, 0.0, 0.25)
    skin = skin_colour(person, colours)
    hair = natural_hair_colour(person, colours)
    melanin = person["melanin"]
    # Ink for lids, brows and nostrils: dark against any skin.
    ink = torch.minimum(skin * 0.16, colours["shadow"])
    warm = torch.tensor([1.04, 0.80, 0.78], device=x.device).view(1, 1, 3, 1, 1)

    flush = bump(side - 0.38, y - 0.33, 0.15, 0.12) + 0.8 * bump(x, y - person["nose_y"] + 0.05, 0.10, 0.09)
    colour = mix(skin, skin * warm, (0.25 + 0.75 * person["blush"]) * flush.clamp(max=1))
    mottle = torch.sin(19 * x + 7 * y) * torch.sin(17 * y - 5 * x + 9 * person["undertone"])
    colour = colour * (1 + 0.02 * mottle)
    colour = _freckled(person, skin, colour, point, pixel)
    fold = bump(side - 0.33, y + 0.015 - 0.115, 0.13, 0.035) * (0.10 + 0.18 * person["age_lines"])
    colour = colour * (1 - fold * front)
    wrinkles = ridge(torch.sin(26 * y + 0.8 * torch.cos(3 * x)), 0.25) * bump(x, y + 0.45, 0.28, 0.11)
    colour = colour * (1 - 0.20 * person["age_lines"] * wrinkles)

    colour = _bearded(person, scene, hair, colour, x, y, z)
    colour, lips = _lips(person, scene, colours, skin, colour, x, y, soft, front)
    nostril = bump(side - 0.55 * person["nose_width"], y - person["nose_y"] - 0.035, 0.030, 0.020)
    colour = mix(colour, ink, (0.85 * nostril * smooth_step(z, 0.5, 0.62)).clamp(max=0.9))
    crease = bump(side - person["nose_width"] - 0.035, y - person["nose_y"] + 0.01, 0.016, 0.05)
    colour = mix(colour, ink, 0.35 * crease * front)

    # A painter's contour of the nose, which shading alone loses on dark skin and in flat light.
    down_nose = smooth_step(y, -0.10, person["nose_y"])
    wide = person["nose_bridge"] + 0.02 + (person["nose_tip"] - person["nose_bridge"]) * down_nose
    flank = ridge((x - person["skew"] * down_nose).abs() - wide, 0.028)
    flank = flank * smooth_step(y, -0.16, 0.0) * smooth_step(y, person["nose_y"] + 0.02, person["nose_y"] - 0.10)
    under = bump(x, y - person["nose_y"] - 0.055, 0.75 * person["nose_width"], 0.028)
    colour = mix(colour, ink, ((0.10 + 0.28 * melanin) * (flank + 1.6 * under) * front).clamp(max=0.6))

    colour, eyes = _eyes(person, scene, colours, ink, colour, x, y, soft, front)
    colour = _brows(person, scene, hair, ink, colour, x, y, soft, front)
    gloss = 0.55 - 0.20 * melanin + 0.8 * lips + 0.25 * bump(x, y - person["nose_y"] + 0.12, 0.08, 0.12)
    return colour, gloss, eyes


def paint_clothes(scene: Columns, colours: Palette, skin: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """Return colour and cloth's share, 0 to 1, of the body's surface at points in body coordinates."""
    _, y, _ = point
    cloth = torch.zeros_like(skin)
    for name in ("red", "blue", "green", "yellow", "white", "black"):
        cloth = cloth + colours[f"garment_colour:{name}"] * scene[f"garment_colour:{name}"]
    # Stripes of the same colour, so that its name stays true.
    other = cloth * 0.35 + 0.12 * scene["garment_colour:black"]
    stripes = smooth_step(torch.sin(2 * torch.pi * y / 0.19), -0.25, 0.25) * scene["garment:striped"]
    cloth = mix(cloth, other, stripes)
    ribs = 1 + 0.10 * scene["garment:roll_neck"] * torch.sin(2 * torch.pi * y / 0.07)
    covered = clothed(scene, point)
    return mix(skin, cloth * ribs, covered), covered


def paint_background(scene: Columns, colours: Palette, across: Tensor, down: Tensor) -> Tensor:
    """Return the colours behind the person; `across` and `down` run from about -0.5 to 0.5 over a square frame."""
    drift = scene["backdrop"]
    x, y = across + 0.25 * drift, down
    wall = mix(colours["wall_top"], colours["wall_bottom"], smooth_step(y - 0.4 * x * drift, -0.5, 0.6))
    leaves = torch.sin(17 * x + 6 * drift) * torch.sin(15 * y + 3) + 0.6 * torch.sin(31 * x + 9 * y) * torch.sin(27 * y)
    park = mix(colours["leaf_dark"], colours["leaf"], smooth_step(leaves, -0.9, 0.9))
    park = mix(park, colours["sky"], smooth_step(0.25 * leaves - 4 * (y + 0.28), 0.1, 1.0))
    beach = mix(colours["sky_high"], colours["sky"], smooth_step(y, -0.5, 0.0))
    beach = mix(beach, colours["sea"], smooth_step(y, 0.02, 0.035))
    beach = mix(beach, colours["sand"], smooth_step(y + 0.03 * torch.sin(7 * x), 0.21, 0.24))
    night = mix(colours["night"], colours["night_low"], smooth_step(y, -0.5, 0.4))
    column, row = torch.floor(x * 7), torch.floor(y * 7)
    key = hashed((column * 131 + row * 71 + 4096).long())
    radius = torch.sqrt((x * 7 - column - 0.5) ** 2 + (y * 7 - row - 0.5) ** 2)
    lamp = smooth_step(radius, 0.42, 0.24) * ((key & 255) < 110) * ((key >> 8 & 255).float() / 510 + 0.35)
    night = mix(night, mix(colours["lamp_warm"], colours["lamp_cool"], ((key >> 16 & 3) == 0).float()), lamp)
    shelf = torch.floor(y * 4.2 + 0.3)
    book = hashed((torch.floor(x * 19 + 5 * shelf) + 977 * shelf + 4096).long())
    library = mix(colours["book_red"], colours["book_blue"], ((book & 3) == 1).float())
    library = mix(library, colours["book_tan"], ((book & 3) == 2).float()) * (0.6 + (book >> 4 & 15).float() / 26)
    edge = (y * 4.2 + 0.3 - shelf - 0.5).abs()
    library = mix(library, colours["wood"], smooth_step(edge, 0.40, 0.43))
    sunset = mix(colours["dusk_high"], colours["dusk"], smooth_step(y, -0.5, 0.05))
    sunset = mix(sunset, colours["dusk_low"], smooth_step(y, 0.0, 0.2))
    sunset = mix(
        sunset, colours["hill"], smooth_step(y + 0.04 * torch.sin(6 * x) + 0.02 * torch.sin(15 * x), 0.2, 0.215)
    )
    scenes = {"wall": wall, "park": park, "beach": beach, "night": night, "library": library, "sunset": sunset}
    total = torch.zeros_like(wall)
    for name, colour in scenes.items():
        total = total + colour * scene[f"background:{name}"]
    return total


def glasses(person: Columns, scene: Columns, x: Tensor, y: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of frame and of lens at points of the plane of the glasses, head coordinates."""
    side = x.abs() - person["eye_x"] - 0.01
    low = y - 0.02
    round_edge = torch.sqrt(side * side + low * low) - 0.225
    over_x, over_y = (side.abs() - 0.15).clamp(min=0), (low.abs() - 0.095).clamp(min=0)
    square_edge = torch.sqrt(over_x * over_x + over_y * over_y) - 0.085
    edge = round_edge * scene["glasses:round"] + square_edge * scene["glasses:square"]
    worn = scene["glasses:round"] + scene["glasses:square"]
    rim = smooth_step(edge.abs(), 0.012 + soft, 0.012 - soft)
    bridge = smooth_step((y + 0.035 + 0.15 * x * x).abs(), 0.012 + soft, 0.012 - soft) * (edge > 0) * (side < 0)
    return worn * torch.maximum(rim, bridge), worn * smooth_step(edge, soft, -soft)


def _between(stops: list[Tensor], position: Tensor) -> Tensor:
    """Return the colour at `position`, 0 to 1, along evenly spaced stops."""
    scaled = position * (len(stops) - 1)
    colour = stops[0] + 0 * scaled
    for number, (low, high) in enumerate(itertools.pairwise(stops)):
        colour = colour + (high - low) * (scaled - number).clamp(0, 1)
    return colour


def _freckled(person: Columns, skin: Tensor, colour: Tensor, point: Point, pixel: Tensor) -> Tensor:
    x, y, z = point
    cell = 0.062
    # Turned and bent, so that no row of the grid can be seen.
    across = (x + 0.53 * y + 0.02 * torch.sin(21 * y)) / cell
    down = (y - 0.47 * x + 0.02 * torch.sin(23 * x)) / cell
    column, row = torch.floor(across), torch.floor(down)
    name = torch.round(person["melanin"] * 8191) + 8192 * torch.round(person["undertone"] * 8191)
    key = hashed((column * 7919 + row * 104729).long() + name.long())
    off_x = across - column - 0.3 - 0.4 * (key & 255).float() / 255
    off_y = down - row - 0.3 - 0.4 * (key >> 8 & 255).float() / 255
    size = 0.17 + 0.13 * (key >> 16 & 255).float() / 255
    spot = bump(off_x, off_y, size, size)
    where = (bump(x.abs() - 0.28, y - 0.28, 0.20, 0.13) + bump(x, y - 0.25, 0.18, 0.12)).clamp(max=1)
    present = ((key >> 24 & 255).float() / 255 < 0.8 * person["freckles"] * where).float() * smooth_step(z, 0.1, 0.3)
    colour = mix(colour, skin * skin.sqrt() * 0.5, 0.7 * spot * present)
    for number in range(3):
        off = (x - person[f"mole_{number}_x"]) ** 2 + (y - person[f"mole_{number}_y"]) ** 2
        size = person[f"mole_{number}_size"]
        mole = smooth_step(torch.sqrt(off + 1e-8), size + 0.5 * pixel, size - 0.5 * pixel) * (size > 0)
        colour = mix(colour, skin * 0.12, 0.85 * mole * smooth_step(z, 0.1, 0.3))
    return colour


def _bearded(person: Columns, scene: Columns, hair: Tensor, colour: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    half = mouth_half_width(person, scene)
    mouth = mouth_line(person, scene, (x / half).clamp(-1.2, 1.2))
    side = x.abs()
    cheek_line = person["nose_y"] + 0.12 - 0.55 * smooth_step(side, 0.30, 0.62)
    jaw = smooth_step(y, cheek_line, cheek_line + 0.10) * smooth_step(
        y, person["chin_y"] + 0.30, person["chin_y"] + 0.1
    )
    around = torch.sqrt((x / (half + 0.09)) ** 2 + ((y - mouth - 0.01) / 0.155) ** 2 + 1e-6)
    beard = jaw * smooth_step(around, 0.95, 1.15) * smooth_step(z, -0.25, 0.0)
    lip = person["mouth_y"] - 0.5 * (person["mouth_y"] - person["nose_y"])
    moustache = bump(x, y - lip - 0.10 * side, 0.62 * half, 0.036)
    grain = 0.82 + 0.18 * torch.sin(61 * x + 9 * y) * torch.sin(47 * y - 13 * x)
    shade = (person["beard"] * beard).clamp(max=1) * 0.9 + 0.85 * person["moustache"] * moustache
    return mix(colour, hair * 0.75, (shade * grain).clamp(0, 0.95))


def _lips(
    person: Columns,
    scene: Columns,
    colours: Palette,
    skin: Tensor,
    colour: Tensor,
    x: Tensor,
    y: Tensor,
    soft: Tensor,
    front: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the colour with lips, teeth and mouth over it, and the lips' share."""
    half = mouth_half_width(person, scene)
    across = x / half
    inside = 1 - across * across
    arch = inside.clamp(min=0)
    from_line = y - mouth_line(person, scene, across.clamp(-1.2, 1.2))
    upper_gap, lower_gap = mouth_gap(scene)
    upper_edge = -upper_gap * arch
    lower_edge = lower_gap * arch
    bow = 1 + 0.16 * person["cupid_bow"] * (ridge(across.abs() - 0.26, 0.16) - ridge(across, 0.12))
    top = upper_edge - person["upper_lip"] * 1.18 * arch**0.8 * bow
    bottom = lower_edge + person["lower_lip"] * 1.12 * arch**0.7
    upper = smooth_step(from_line, top - soft, top + soft) * smooth_step(
        from_line, upper_edge + soft, upper_edge - soft
    )
    lower = smooth_step(from_line, bottom + soft, bottom - soft) * smooth_step(
        from_line, lower_edge - soft, lower_edge + soft
    )
    present = smooth_step(inside, -0.02, 0.10) * front

    tint = torch.tensor([0.95, 0.52, 0.52], device=x.device).view(1, 1, 3, 1, 1)
    deep = torch.tensor([0.86, 0.62, 0.62], device=x.device).view(1, 1, 3, 1, 1)
    lip = mix(skin * tint, skin * deep, person["melanin"]) * (1.2 - 0.5 * person["lip_colour"])
    lip = mix(lip, colours["rose"], 0.75 * person["makeup"])
    colour = mix(colour, lip * 0.80, upper * present)
    # The lower lip of dark skin is pinker than the upper one.
    colour = mix(colour, mix(lip, colours["rose"], 0.14 * person["melanin"]) * 1.06, lower * present)

    open_share = smooth_step(from_line, upper_edge - soft, upper_edge + soft) * smooth_step(
        from_line, lower_edge + soft, lower_edge - soft
    )
    open_share = open_share * present * smooth_step(scene["mouth_open"], 0.02, 0.15)
    teeth = smooth_step(from_line, upper_edge + 0.06 + soft, upper_edge + 0.06 - soft) * (
        0.35 + 0.65 * scene["smile"].clamp(max=1)
    )
    cavity = mix(
        colours["mouth"] + 0 * x,
        colours["teeth"] * (0.78 - 0.28 * person["melanin"]),
        teeth * smooth_step(inside, 0.0, 0.25),
    )
    colour = mix(colour, cavity, open_share)
    seam = ridge(from_line, 0.011 + 0.35 * soft) * (1 - smooth_step(scene["mouth_open"], 0.05, 0.3))
    corner = bump(across.abs() - 1.0, from_line, 0.10, 0.022)
    dark = torch.minimum(skin * 0.20, colours["mouth"])
    colour = mix(colour, dark, ((0.75 * seam * present).clamp(max=1) + 0.45 * corner * front).clamp(max=0.9))
    return colour, ((upper + lower) * present).clamp(max=1)


def _eyes(
    person: Columns,
    scene: Columns,
    colours: Palette,
    ink: Tensor,
    colour: Tensor,
    x: Tensor,
    y: Tensor,
    soft: Tensor,
    front: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the colour with both eyes over it, and the eyeballs' share."""
    sign = torch.where(x < 0, -1.0, 1.0)
    side = x.abs() - person["eye_x"]
    across = side / person["eye_width"]
    slope = y + person["eye_tilt"] * side
    squint = 0.22 * scene["smile"] + 0.25 * scene["frown"] - 0.25 * scene["brow_raise"].clamp(min=0)
    height = person["eye_height"] * (1 - squint) * (1 - 0.95 * scene["blink"])
    arch = (1 - across * across).clamp(min=0)
    # The upper lid is highest a little towards the nose, the lower lid lowest a little outwards.
    upper_edge = -height * arch**0.75 * (1 - 0.16 * across) + 0.035 * scene["blink"] * arch
    lower_edge = 0.62 * person["eye_height"] * (1 - 0.6 * squint) * arch**0.8 * (1 + 0.18 * across)
    open_share = smooth_step(slope, upper_edge - soft, upper_edge + soft)
    open_share = open_share * smooth_step(slope, lower_edge + soft, lower_edge - soft)
    open_share = open_share * smooth_step(across.abs(), 1.03, 0.93) * front

    # Lids first: crease, shadow, then lashes over the eyeball's edge.
    shadow = bump(side, slope - upper_edge + 0.05, 0.15, 0.05)
    colour = mix(colour, colour * 0.62, 0.5 * shadow * front)
    tinted = mix(
        colour, mix(colours["hair_colour:blue"], colours["rose"], person["lip_colour"]) * 0.35, 0.45 * person["makeup"]
    )
    colour = mix(colour, tinted, (bump(side, slope - upper_edge + 0.04, 0.12, 0.035) * front).clamp(max=1))
    crease = ridge(slope - upper_edge + 0.05 + 0.012 * across, 0.012 + 0.3 * soft)
    crease = crease * smooth_step(across.abs(), 1.1, 0.7)
    colour = mix(colour, ink, 0.50 * person["lid_crease"] * crease * front)

    gaze_x = 0.045 * scene["gaze_x"].clamp(-1.2, 1.2) * sign
    iris_x, iris_y = side - gaze_x, y + 0.008 - 0.03 * scene["gaze_y"].clamp(-1, 1)
    distance = torch.sqrt(iris_x**2 + iris_y**2 + 1e-8)
    radius = 0.073
    tone = _between([colours["iris_dark"], colours["iris_amber"]], (person["iris_tone"] * 2.2).clamp(max=1))
    cold = mix(colours["iris_green"], colours["iris_blue"], smooth_step(person["iris_hue"], 0.3, 0.7))
    iris = mix(tone, cold, smooth_step(person["iris_tone"], 0.35, 0.6))
    iris = iris * (0.75 + 0.45 * smooth_step(iris_y, -0.05, 0.06))
    iris = mix(iris, iris * 0.25, smooth_step(distance, 0.80 * radius, radius))
    iris = mix(iris, colours["shadow"] * 0.2, smooth_step(distance, 0.032 + soft, 0.032 - soft))
    sclera = colours["sclera"] * (0.92 - 0.12 * person["melanin"]) * (1 - 0.28 * across.abs() ** 2)
    ball = mix(sclera, iris, smooth_step(distance, radius + soft, radius - soft))
    ball = ball * (0.50 + 0.50 * smooth_step(slope - upper_edge, 0.0, 0.055))
    glint_x, glint_y = iris_x * sign - 0.022 * torch.sign(scene["light_x"] + 1e-3), iris_y + 0.026
    glint = smooth_step(torch.sqrt(glint_x**2 + glint_y**2 + 1e-8), 0.020 + soft, 0.020 - soft)
    ball = mix(ball, colours["light_colour:white"] + 0 * x, 0.85 * glint)
    colour = mix(colour, ball, open_share)

    near_corner = smooth_step(across.abs(), 1.25, 0.9)
    thick = 0.013 + 0.010 * person["makeup"] + 0.008 * smooth_step(across, -0.4, 1.0) + 0.35 * soft
    lash = ridge(slope - upper_edge + 0.006, thick) * near_corner
    wing = ridge(slope + 0.035 * (across - 1), thick) * ridge(across - 1.06, 0.10)
    low_lash = ridge(slope - lower_edge - 0.004, 0.008 + 0.3 * soft) * near_corner
    colour = mix(colour, ink * 0.7, (0.90 * torch.maximum(lash, 0.8 * wing) * front).clamp(max=0.95))
    colour = mix(colour, ink, 0.32 * low_lash * front)
    return colour, open_share


def _brows(
    person: Columns,
    scene: Columns,
    hair: Tensor,
    ink: Tensor,
    colour: Tensor,
    x: Tensor,
    y: Tensor,
    soft: Tensor,
    front: Tensor,
) -> Tensor:
    along = (x.abs() - 0.125) / (2 * person["brow_length"] * 0.82)
    raised = scene["brow_raise"]
    middle = (
        person["brow_y"]
        - 0.075 * raised.clamp(min=0)
        - person["brow_arch"] * (1 - ((along - 0.62) / 0.62) ** 2)
        - person["brow_tilt"] * (along - 0.4) * 0.5
        + 0.055 * scene["frown"] * (1.1 - 2.0 * along)
    )
    thick = person["brow_thickness"] * smooth_step(along, 1.08, 0.45) * (0.65 + 0.35 * smooth_step(along, -0.02, 0.25))
    edge = (y - middle).abs() - thick
    share = (
        smooth_step(edge, soft + 0.008, -soft - 0.004) * smooth_step(along, -0.06, 0.06) * smooth_step(along, 1.05, 0.9)
    )
    hairs = 0.86 + 0.14 * torch.sin(95 * (x.abs() + 0.5 * y))
    brow = torch.minimum(mix(hair * 0.6, ink, 0.35), mix(colour, ink, 0.6))
    return mix(colour, brow, 0.92 * share * hairs * front)
