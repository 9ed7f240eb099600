"""Frames of drawn people: rays marched through the shapes, lit, painted and put over the background.

Everything is arithmetic on tensors of people x frames x pixels, with no branch on a value: torch.compile fuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echovideo.synthetic import head, paint
from echovideo.synthetic.clip import CURVES, ClipCondition, scene_curves
from echovideo.synthetic.head import Columns, Point, smooth_step
from echovideo.synthetic.paint import mix
from echovideo.synthetic.person import PARAMETERS, Person

SIDE = 96
"""Height and width of a frame unless asked otherwise."""

_CAMERA = 9.0
_CENTRE_Y = 0.20
_NEAR, _FAR = 1.7, 1.4
_STEPS = 14
_NORMAL_STEP = 0.012
_PIVOT_Y, _PIVOT_Z = 0.75, -0.30
_GLASSES_Z = 0.80
_DEGREE = math.pi / 180


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawing:
    """Clips of drawn people and what is true of them.

    `frames_BFCHW` float32 RGB, 0 to 1. `face_BFHW` and `hair_BFHW` float32, the share of each pixel that shows the face
    (skin, eyes, mouth, glasses; no ears, no neck) and the hair. `landmarks_BF52` float32, x and y in pixels from the
    frame's upper left corner, where a pixel's centre is at .5: eyes, nose tip, mouth corners, the picture's left first.
    """

    frames_BFCHW: Tensor
    face_BFHW: Tensor
    hair_BFHW: Tensor
    landmarks_BF52: Tensor


def draw(
    people: Sequence[Person],
    conditions: Sequence[ClipCondition],
    *,
    frames: int,
    height: int = SIDE,
    width: int = SIDE,
    device: torch.device | str = "cpu",
) -> Drawing:
    """Return a clip of `frames` frames of each person under the condition beside them."""
    identity = torch.tensor([person.parameters for person in people], device=device)
    return draw_tensors(identity, scene_curves(conditions, frames).to(device), height, width)


def draw_references(
    people: Sequence[Person],
    *,
    side: int = SIDE,
    device: torch.device | str = "cpu",
) -> Drawing:
    """Return one neutral frame of each person, as a passport photo: F is 1."""
    condition = ClipCondition(seed=0)
    scene = scene_curves([condition] * len(people), 1, reference=True)
    identity = torch.tensor([person.parameters for person in people], device=device)
    return draw_tensors(identity, scene.to(device), side, side)


def draw_tensors(identity_BP: Tensor, scene_BFS: Tensor, height: int, width: int) -> Drawing:
    """Return the clips of an identity tensor and a scene tensor: the function to compile."""
    return Drawing(
        **dict(
            zip(
                ("frames_BFCHW", "face_BFHW", "hair_BFHW", "landmarks_BF52"),
                _draw(identity_BP, scene_BFS, height, width),
                strict=True,
            )
        )
    )


def _draw(identity_BP: Tensor, scene_BFS: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return frames, face, hair and landmarks. Scalars are (B, F, 1, H, W) and colours (B, F, 3, H, W) inside."""
    person = {
        name: column[:, None, None, None, None]
        for name, column in zip(PARAMETERS, identity_BP.unbind(1), strict=True)
    }
    scene = {
        name: column[:, :, None, None, None] for name, column in zip(CURVES, scene_BFS.unbind(2), strict=True)
    }
    colours = paint.palette(identity_BP)
    turn, body_turn = _rotation(scene), _body_rotation(scene)
    zoom = scene["zoom"]
    pixel = 1 / (height * zoom)

    rows = torch.arange(height, device=identity_BP.device, dtype=identity_BP.dtype)[:, None]
    columns = torch.arange(width, device=identity_BP.device, dtype=identity_BP.dtype)[None]
    across, down = (columns + 0.5 - width / 2) / height, (rows + 0.5) / height - 0.5
    target_x = across / zoom - scene["shift_x"]
    target_y = down / zoom - scene["shift_y"] + _CENTRE_Y
    # Through the camera and the target plane z = 0; the camera stays in front of the picture's centre.
    camera_x, camera_y = -scene["shift_x"], _CENTRE_Y - scene["shift_y"]
    length = torch.sqrt((target_x - camera_x) ** 2 + (target_y - camera_y) ** 2 + _CAMERA**2)
    ray_x, ray_y, ray_z = (target_x - camera_x) / length, (target_y - camera_y) / length, -_CAMERA / length

    def at(distance: Tensor) -> Point:
        return camera_x + ray_x * distance, camera_y + ray_y * distance, _CAMERA + ray_z * distance

    def nearest(point: Point) -> Tensor:
        in_head, in_body = _to_head(turn, point), _to_body(body_turn, point)
        return torch.minimum(
            torch.minimum(head.head_distance(person, scene, in_head), head.ear_distance(person, in_head)),
            torch.minimum(head.hair_distance(person, scene, in_head), head.body_distance(scene, in_body)),
        )

    travelled = torch.full_like(length, _CAMERA - _NEAR)
    closest = torch.full_like(length, 1e3)
    best = travelled
    for _ in range(_STEPS):
        distance = nearest(at(travelled))
        closer = distance < closest
        closest = torch.where(closer, distance, closest)
        best = torch.where(closer, travelled, best)
        # A ray that grazes an outline must still get past it.
        stride = torch.where(distance > 0.3 * pixel, distance.clamp(min=0.04), 0.9 * distance)
        travelled = (travelled + stride).clamp(max=_CAMERA + _FAR)
    solid = (1.25 - closest / pixel).clamp(0, 1)

    point = at(best)
    normal = _normal(nearest, point)
    in_head, in_body = _to_head(turn, point), _to_body(body_turn, point)
    face = head.head_distance(person, scene, in_head)
    ears = head.ear_distance(person, in_head)
    hair = head.hair_distance(person, scene, in_head)
    body = head.body_distance(scene, in_body)
    edge = 0.5 * pixel
    hair_share = smooth_step(hair - torch.minimum(torch.minimum(face, ears), body), edge, -edge)
    body_share = smooth_step(body - torch.minimum(face, ears), edge, -edge)
    ear_share = smooth_step(ears - face, edge, -edge)

    colour, gloss, eyes = paint.paint_face(person, scene, colours, in_head, pixel)
    skin = paint.skin_colour(person, colours)
    colour = mix(colour, skin * 0.95, ear_share)
    eyes, gloss = eyes * (1 - ear_share), mix(gloss, 0.4 + 0 * ear_share, ear_share)
    clothes, covered = paint.paint_clothes(scene, colours, skin, in_body)
    colour = mix(colour, clothes, body_share)
    gloss = mix(gloss, 0.4 * (1 - 0.8 * covered), body_share)
    colour = mix(colour, paint.paint_hair(person, scene, colours, in_head), hair_share)
    eyes = eyes * (1 - body_share) * (1 - hair_share)
    flesh = (1 - hair_share) * (1 - body_share * covered)

    lit = _light(person, scene, colours, nearest, point, normal, in_head, colour, gloss, eyes, hair_share, flesh)
    behind = paint.paint_background(scene, colours, across, down)
    picture = mix(behind * (0.75 + 0.25 * paint_light(scene, colours)), lit, solid)
    picture = _with_glasses(person, scene, colours, turn, at, picture, solid * (1 - hair_share), pixel)

    frames = paint.srgb((picture / (1 + 0.12 * picture)).clamp(0, 1))
    face_share = solid * (1 - hair_share) * (1 - body_share) * (1 - ear_share) * smooth_step(in_head[2], -0.2, 0.0)
    shape = torch.broadcast_shapes(frames.shape, (len(identity_BP), scene_BFS.shape[1], 3, height, width))
    points = head.landmarks(
        {name: column[:, :, :, 0] for name, column in person.items()},
        {name: column[:, :, :, 0] for name, column in scene.items()},
    )
    placed = _project(turn, scene, points, height, width)
    return frames.expand(shape), face_share[:, :, 0], (solid * hair_share)[:, :, 0], placed


def paint_light(scene: Columns, colours: paint.Palette) -> Tensor:
    """Return the colour of the light, (B, F, 3, 1, 1)."""
    total = torch.zeros_like(colours["light_colour:white"])
    for name in ("light_colour:white", "light_colour:warm", "light_colour:cool"):
        total = total + colours[name] * scene[name]
    return total


def _light(
    person: Columns,
    scene: Columns,
    colours: paint.Palette,
    nearest: Callable[[Point], Tensor],
    point: Point,
    normal: Point,
    in_head: Point,
    colour: Tensor,
    gloss: Tensor,
    eyes: Tensor,
    hair: Tensor,
    flesh: Tensor,
) -> Tensor:
    """Return the light that the surface sends to the camera: a soft key light, a fill, sky and ground, highlights."""
    size = torch.sqrt(scene["light_x"] ** 2 + scene["light_y"] ** 2 + scene["light_z"] ** 2)
    light = scene["light_x"] / size, scene["light_y"] / size, scene["light_z"] / size
    x, y, z = point
    facing = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
    # Light bleeds through skin, red the farthest.
    wrap = torch.tensor([0.42, 0.26, 0.20], device=x.device).view(1, 1, 3, 1, 1)
    wrap = mix(torch.full_like(wrap, 0.25), wrap, flesh)
    diffuse = ((facing + wrap) / (1 + wrap)).clamp(min=0)

    reach = 0.15
    open_air = nearest((x + reach * normal[0], y + reach * normal[1], z + reach * normal[2])) / reach
    occlusion = 0.35 + 0.65 * open_air.clamp(0, 1)
    shadow = torch.ones_like(facing)
    for length in (0.14, 0.40):
        clear = nearest(tuple(p + 0.04 * n + length * d for p, n, d in zip(point, normal, light, strict=True)))
        shadow = torch.minimum(shadow, 0.30 + 0.70 * smooth_step(clear / length, -0.15, 0.42))

    tint = paint_light(scene, colours)
    # As a photographer would, dark skin gets more light, so that its features stay as readable.
    exposure = 1 + 0.42 * person["melanin"] * flesh
    sky = 0.34 + 0.10 * -normal[1] + 0.06 * normal[2]
    fill = 0.16 * (-0.8 * normal[0] * torch.sign(scene["light_x"]) + 0.5 * normal[2]).clamp(min=0)
    ambient = (sky * mix(torch.ones_like(tint), tint, 0.4) + fill) * scene["ambient"] * occlusion
    shading = (0.88 * scene["key"] * diffuse * shadow * tint + ambient) * exposure
    # Eyes are wet and lie in shade: they take less of the shading than skin.
    shading = mix(shading, 0.35 * shading + 0.50 * tint, eyes)

    half = light[0], light[1], light[2] + 1
    half_size = torch.sqrt(half[0] ** 2 + half[1] ** 2 + half[2] ** 2)
    mirror = ((normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2]) / half_size).clamp(min=0)
    highlight = 0.055 * mirror**14 + 0.05 * mirror**48
    skin_shine = highlight * gloss * flesh * (1 - eyes) * shadow
    band = head.ridge(normal[1] + 0.55 + 0.06 * torch.sin(23 * in_head[0] + 7 * in_head[2]), 0.16)
    hair_shine = 0.14 * band * hair * (1 - 0.6 * person["curl"]) * (0.6 + 0.4 * facing)
    rim = 0.10 * (1 - normal[2].clamp(0, 1)) ** 3 * (0.5 - 0.5 * normal[1])
    lit = colour * shading + (skin_shine * (1 + 0.3 * person["melanin"]) + hair_shine) * tint
    return lit + rim * (0.3 + colour) * tint * occlusion


def _with_glasses(
    person: Columns,
    scene: Columns,
    colours: paint.Palette,
    turn: tuple[Tensor, ...],
    at: Callable[[Tensor], Point],
    picture: Tensor,
    visible: Tensor,
    pixel: Tensor,
) -> Tensor:
    """Return the picture with the glasses, a flat drawing in a plane before the eyes."""
    start, end = _to_head(turn, at(torch.full_like(visible, _CAMERA - _NEAR))), _to_head(turn, at(torch.full_like(visible, _CAMERA + 1)))
    share = (_GLASSES_Z - start[2]) / (end[2] - start[2])
    x = start[0] + (end[0] - start[0]) * share
    y = start[1] + (end[1] - start[1]) * share
    rim, lens = paint.glasses(person, scene, x, y, 0.6 * pixel)
    frame = mix(colours["frame"], colours["gold"], (scene["frame_colour"] > 0.3).float())
    glare = 0.10 * smooth_step(x.abs() * 0.8 + y, 0.30, 0.42)
    picture = mix(picture, colours["light_colour:white"] * 0.8, lens * glare * visible)
    return mix(picture, frame, 0.85 * rim)


def _normal(nearest: Callable[[Point], Tensor], point: Point) -> Point:
    """Return the unit normal from four distances in the corners of a tetrahedron (iquilezles.org/articles/normalsSDF)."""
    x, y, z = point
    step = _NORMAL_STEP
    total_x, total_y, total_z = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for sign_x, sign_y, sign_z in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        distance = nearest((x + sign_x * step, y + sign_y * step, z + sign_z * step))
        total_x, total_y, total_z = total_x + sign_x * distance, total_y + sign_y * distance, total_z + sign_z * distance
    length = torch.sqrt(total_x**2 + total_y**2 + total_z**2 + 1e-12)
    return total_x / length, total_y / length, total_z / length


def _rotation(scene: Columns) -> tuple[Tensor, ...]:
    """Return the nine entries, row by row, of the head's rotation: pitch (up), then yaw (right), then roll (clockwise)."""
    cos_y, sin_y = torch.cos(scene["yaw"] * _DEGREE), torch.sin(scene["yaw"] * _DEGREE)
    cos_p, sin_p = torch.cos(scene["pitch"] * _DEGREE), torch.sin(scene["pitch"] * _DEGREE)
    cos_r, sin_r = torch.cos(scene["roll"] * _DEGREE), torch.sin(scene["roll"] * _DEGREE)
    turned = (
        (cos_y, sin_y * sin_p, sin_y * cos_p),
        (torch.zeros_like(cos_y), cos_p, -sin_p),
        (-sin_y, cos_y * sin_p, cos_y * cos_p),
    )
    first = tuple(cos_r * a - sin_r * b for a, b in zip(turned[0], turned[1], strict=True))
    second = tuple(sin_r * a + cos_r * b for a, b in zip(turned[0], turned[1], strict=True))
    return *first, *second, *turned[2]


def _body_rotation(scene: Columns) -> tuple[Tensor, Tensor]:
    angle = 0.3 * scene["yaw"] * _DEGREE
    return torch.cos(angle), torch.sin(angle)


def _to_head(turn: tuple[Tensor, ...], point: Point) -> Point:
    x, y, z = point[0], point[1] - _PIVOT_Y, point[2] - _PIVOT_Z
    return (
        turn[0] * x + turn[3] * y + turn[6] * z,
        turn[1] * x + turn[4] * y + turn[7] * z + _PIVOT_Y,
        turn[2] * x + turn[5] * y + turn[8] * z + _PIVOT_Z,
    )


def _to_body(turn: tuple[Tensor, Tensor], point: Point) -> Point:
    cosine, sine = turn
    x, z = point[0], point[2] - _PIVOT_Z
    return cosine * x - sine * z, point[1], sine * x + cosine * z + _PIVOT_Z


def _project(turn: tuple[Tensor, ...], scene: Columns, points: Point, height: int, width: int) -> Tensor:
    """Return where points in head coordinates (B, F, 1, N) fall in the picture: (B, F, N, 2) pixels."""
    flat = [entry[:, :, :, 0] for entry in turn]
    x, y, z = points[0], points[1] - _PIVOT_Y, points[2] - _PIVOT_Z
    world_x = flat[0] * x + flat[1] * y + flat[2] * z
    world_y = flat[3] * x + flat[4] * y + flat[5] * z + _PIVOT_Y
    world_z = flat[6] * x + flat[7] * y + flat[8] * z + _PIVOT_Z
    shift_x, shift_y, zoom = (scene[name][:, :, :, 0] for name in ("shift_x", "shift_y", "zoom"))
    near = _CAMERA / (_CAMERA - world_z)
    across = (world_x + shift_x) * near * zoom
    down = (world_y - _CENTRE_Y + shift_y) * near * zoom
    return torch.stack((across * height + width / 2, (down + 0.5) * height), dim=-1)[:, :, 0]
