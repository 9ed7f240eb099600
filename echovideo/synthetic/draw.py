"""Frames of drawn people: rays marched through the shapes, lit, painted and put over the background.

Everything is arithmetic on tensors of people x frames x pixels, with no branch on a value: torch.compile fuses it.
Scalars have the shape (B, F, 1, H, W) and colours (B, F, 3, H, W).
"""

from __future__ import annotations

import functools
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
_STEPS = 13
_LANDMARK_STEPS = 16
_OPEN_REACH = 0.15
_SHADOW_REACH = (0.14, 0.40)
_NORMAL_STEP = 0.012
_PIVOT_Y, _PIVOT_Z = 0.75, -0.30
_GLASSES_Z = 0.80


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawing:
    """Clips of drawn people and what is true of them.

    `frames_BFCHW` float32 RGB, 0 to 1. `face_BFHW` and `hair_BFHW` float32, the share of each pixel that shows the face
    (skin, eyes, mouth, glasses; no ears, no neck) and the hair. `landmarks_BF52` float32, x and y in pixels from the
    frame's upper left corner, where a pixel's centre is at .5: eyes, nose tip, mouth corners, the picture's left first.
    """

    frames_BFCHW: Tensor  # noqa: N815
    face_BFHW: Tensor  # noqa: N815
    hair_BFHW: Tensor  # noqa: N815
    landmarks_BF52: Tensor  # noqa: N815


def draw(
    people: Sequence[Person],
    conditions: Sequence[ClipCondition],
    *,
    frames: int,
    height: int = SIDE,
    width: int = SIDE,
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Drawing:
    """Return a clip of `frames` frames of each person under the condition beside them."""
    identity = torch.tensor([person.parameters for person in people], device=device)
    scene = scene_curves(conditions, frames).to(device)
    return draw_tensors(identity, scene, height, width, compiled=compiled)


def draw_references(
    people: Sequence[Person],
    *,
    side: int = SIDE,
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Drawing:
    """Return one neutral frame of each person, as a passport photo: F is 1."""
    scene = scene_curves([ClipCondition(seed=0)] * len(people), 1, reference=True).to(device)
    identity = torch.tensor([person.parameters for person in people], device=device)
    return draw_tensors(identity, scene, side, side, compiled=compiled)


@torch.no_grad()
def draw_tensors(identity_BP: Tensor, scene_BFS: Tensor, height: int, width: int, *, compiled: bool = False) -> Drawing:
    """Return the clips of an identity tensor and a scene tensor, float32 on one device.

    `compiled` runs the three functions that all time is spent in through torch.compile, once for each shape.
    """
    surface, shade, skull = _stages(compiled)
    scene = _scene(scene_BFS)
    pixel = 1 / (height * scene["zoom"])
    rays = _rays(scene, height, width)

    travelled = torch.full_like(rays[3], _CAMERA - _NEAR)
    closest, best = torch.full_like(travelled, _CAMERA), travelled
    for _ in range(_STEPS):
        distance = surface(identity_BP, scene_BFS, *_along(rays, travelled))
        best = torch.where(distance < closest, travelled, best)
        closest = torch.minimum(distance, closest)
        # A ray that grazes an outline must still get past it.
        stride = torch.where(distance > 0.3 * pixel, distance.clamp(min=0.04), 0.9 * distance)
        travelled = (travelled + stride).clamp(max=_CAMERA + _FAR)

    point = _along(rays, best)
    normal = _normal(lambda x, y, z: surface(identity_BP, scene_BFS, x, y, z), point)
    light = _light_direction(scene)
    open_air = surface(identity_BP, scene_BFS, *_moved(point, normal, _OPEN_REACH))
    lifted = _moved(point, normal, 0.04)
    near_shade, far_shade = (surface(identity_BP, scene_BFS, *_moved(lifted, light, reach)) for reach in _SHADOW_REACH)
    frames, face, hair = shade(
        identity_BP, scene_BFS, point, normal, closest, open_air, near_shade, far_shade, height, width
    )

    x, y = head.landmark_columns(_person(identity_BP), scene)
    z = torch.full_like(x, 1.1)
    for _ in range(_LANDMARK_STEPS):
        z = z - skull(identity_BP, scene_BFS, x, y, z)
    return Drawing(
        frames_BFCHW=frames,
        face_BFHW=face[:, :, 0],
        hair_BFHW=hair[:, :, 0],
        landmarks_BF52=_project(scene, (x, y, z), height, width),
    )


@functools.cache
def _stages(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    if not compiled:
        return _surface_distance, _shade, _skull_distance
    surface: Callable[..., Tensor] = torch.compile(_surface_distance, dynamic=False)
    shade: Callable[..., tuple[Tensor, ...]] = torch.compile(_shade, dynamic=False)
    skull: Callable[..., Tensor] = torch.compile(_skull_distance, dynamic=False)
    return surface, shade, skull


def _person(identity_BP: Tensor) -> Columns:
    return {
        name: column[:, None, None, None, None] for name, column in zip(PARAMETERS, identity_BP.unbind(1), strict=True)
    }


def _scene(scene_BFS: Tensor) -> Columns:
    return {name: column[:, :, None, None, None] for name, column in zip(CURVES, scene_BFS.unbind(2), strict=True)}


def _skull_distance(identity_BP: Tensor, scene_BFS: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the distance of points in head coordinates to the bald head."""
    return head.head_distance(_person(identity_BP), _scene(scene_BFS), (x, y, z))


def _surface_distance(identity_BP: Tensor, scene_BFS: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the distance of points (B, F, 1, H, W) in the world to the nearest surface of the person."""
    person, scene = _person(identity_BP), _scene(scene_BFS)
    in_head, in_body = _to_head(_turn(scene), (x, y, z)), _to_body(scene, (x, y, z))
    return torch.minimum(
        torch.minimum(head.head_distance(person, scene, in_head), head.ear_distance(person, in_head)),
        torch.minimum(head.hair_distance(person, scene, in_head), head.body_distance(scene, in_body)),
    )


def _shade(
    identity_BP: Tensor,
    scene_BFS: Tensor,
    point: Point,
    normal: Point,
    closest: Tensor,
    open_air: Tensor,
    near_shade: Tensor,
    far_shade: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return frames (B, F, 3, H, W) and the shares of face and hair (B, F, 1, H, W) from what the rays met."""
    person, scene = _person(identity_BP), _scene(scene_BFS)
    colours = paint.palette(identity_BP)
    pixel = 1 / (height * scene["zoom"])
    solid = (1.25 - closest / pixel).clamp(0, 1)

    in_head, in_body = _to_head(_turn(scene), point), _to_body(scene, point)
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
    gloss = mix(gloss, 0.4 + 0 * ear_share, ear_share)
    clothes, covered = paint.paint_clothes(scene, colours, skin, in_body)
    colour = mix(colour, clothes, body_share)
    gloss = mix(gloss, 0.4 * (1 - 0.8 * covered), body_share)
    colour = mix(colour, paint.paint_hair(person, scene, colours, in_head), hair_share)
    bare = (1 - ear_share) * (1 - body_share) * (1 - hair_share)
    flesh = (1 - hair_share) * (1 - body_share * covered)

    occlusion = 0.35 + 0.65 * (open_air / _OPEN_REACH).clamp(0, 1)
    lit_share = torch.minimum(
        smooth_step(near_shade / _SHADOW_REACH[0], -0.15, 0.42), smooth_step(far_shade / _SHADOW_REACH[1], -0.15, 0.42)
    )
    shadow = 0.40 + 0.60 * lit_share
    lit = _light(
        person, scene, colours, normal, in_head, colour, gloss, eyes * bare, hair_share, flesh, occlusion, shadow
    )

    across, down = _picture_plane(scene["zoom"], height, width)
    behind = paint.paint_background(scene, colours, across, down)
    picture = mix(behind * (0.75 + 0.25 * paint.light_colour(scene, colours)), lit, solid)
    picture = _with_glasses(
        person, scene, colours, _rays(scene, height, width), picture, solid * (1 - hair_share), pixel
    )
    frames = paint.srgb((picture / (1 + 0.12 * picture)).clamp(0, 1))
    return frames, solid * bare * smooth_step(in_head[2], -0.2, 0.0), solid * hair_share


def _picture_plane(like: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return each pixel's place across and down the picture, in picture heights from its middle."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)[:, None]
    columns = torch.arange(width, device=like.device, dtype=like.dtype)[None]
    return (columns + 0.5 - width / 2) / height, (rows + 0.5) / height - 0.5


def _rays(scene: Columns, height: int, width: int) -> tuple[Tensor, ...]:
    """Return the camera's x and y and each pixel's ray as a unit vector, x, y, z, in the world of the person."""
    across, down = _picture_plane(scene["zoom"], height, width)
    camera_x, camera_y = -scene["shift_x"], _CENTRE_Y - scene["shift_y"]
    # Through the camera and the pixel's place in the plane z = 0.
    right, below = across / scene["zoom"], down / scene["zoom"]
    per_length = torch.rsqrt(right * right + below * below + _CAMERA**2)
    return camera_x, camera_y, right * per_length, below * per_length, -_CAMERA * per_length


def _along(rays: tuple[Tensor, ...], distance: Tensor) -> Point:
    camera_x, camera_y, x, y, z = rays
    return camera_x + x * distance, camera_y + y * distance, _CAMERA + z * distance


def _moved(point: Point, direction: Point, length: float) -> Point:
    return (
        point[0] + length * direction[0],
        point[1] + length * direction[1],
        point[2] + length * direction[2],
    )


def _light_direction(scene: Columns) -> Point:
    return scene["light_x"], scene["light_y"], scene["light_z"]


def _light(
    person: Columns,
    scene: Columns,
    colours: paint.Palette,
    normal: Point,
    in_head: Point,
    colour: Tensor,
    gloss: Tensor,
    eyes: Tensor,
    hair: Tensor,
    flesh: Tensor,
    occlusion: Tensor,
    shadow: Tensor,
) -> Tensor:
    """Return the light that the surface sends to the camera: a soft key light, a fill, sky and ground, highlights."""
    light = _light_direction(scene)
    facing = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
    # Light bleeds through skin, red the farthest.
    wrap = torch.tensor([0.42, 0.26, 0.20], device=facing.device).view(1, 1, 3, 1, 1)
    wrap = mix(torch.full_like(wrap, 0.25), wrap, flesh)
    diffuse = ((facing + wrap) / (1 + wrap)).clamp(min=0)

    tint = paint.light_colour(scene, colours)
    # As a photographer would, dark skin gets more light, and softer, so that its features stay as readable.
    exposure = 1 + (1.6 * person["melanin"] ** 2 - 0.14) * flesh
    sky = 0.34 + 0.10 * -normal[1] + 0.06 * normal[2] + 0.34 * person["melanin"] * flesh
    fill = 0.16 * (-0.8 * normal[0] * torch.sign(scene["light_x"]) + 0.5 * normal[2]).clamp(min=0)
    ambient = (sky * mix(torch.ones_like(tint), tint, 0.4) + fill) * scene["ambient"] * occlusion
    shading = ((0.88 - 0.34 * person["melanin"] * flesh) * scene["key"] * diffuse * shadow * tint + ambient) * exposure
    # Eyes are wet and lie in shade: they take less of the shading than skin.
    shading = mix(shading, 0.35 * shading + 0.50 * tint, eyes)

    half = light[0], light[1], light[2] + 1
    half_size = torch.rsqrt(half[0] * half[0] + half[1] * half[1] + half[2] * half[2])
    mirror = ((normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2]) * half_size).clamp(min=0)
    mirror_4 = mirror * mirror * mirror * mirror
    mirror_16 = mirror_4 * mirror_4 * mirror_4 * mirror_4
    highlight = 0.055 * mirror_16 + 0.05 * mirror_16 * mirror_16 * mirror_16
    skin_shine = highlight * gloss * flesh * (1 - eyes) * shadow
    band = head.ridge(normal[1] + 0.55 + 0.06 * torch.sin(23 * in_head[0] + 7 * in_head[2]), 0.16)
    hair_shine = 0.14 * band * hair * (1 - 0.6 * person["curl"]) * (0.6 + 0.4 * facing)
    edge = 1 - normal[2].clamp(0, 1)
    rim = 0.10 * edge * edge * edge * (0.5 - 0.5 * normal[1])
    lit = colour * shading + (skin_shine + hair_shine) * tint
    return lit + rim * (0.3 + colour) * tint * occlusion


def _with_glasses(
    person: Columns,
    scene: Columns,
    colours: paint.Palette,
    rays: tuple[Tensor, ...],
    picture: Tensor,
    visible: Tensor,
    pixel: Tensor,
) -> Tensor:
    """Return the picture with the glasses, a flat drawing in a plane before the eyes."""
    turn = _turn(scene)
    start = _to_head(turn, _along(rays, torch.full_like(visible, _CAMERA - _NEAR)))
    end = _to_head(turn, _along(rays, torch.full_like(visible, _CAMERA + 1)))
    share = (_GLASSES_Z - start[2]) / (end[2] - start[2])
    x = start[0] + (end[0] - start[0]) * share
    y = start[1] + (end[1] - start[1]) * share
    rim, lens = paint.glasses(person, scene, x, y, 0.6 * pixel)
    frame = mix(colours["frame"], colours["gold"], (scene["frame_colour"] > 0.3).float())
    glare = 0.10 * smooth_step(x.abs() * 0.8 + y, 0.30, 0.42)
    picture = mix(picture, colours["light_colour:white"] * 0.8, lens * glare * visible)
    return mix(picture, frame, 0.75 * rim)


def _normal(nearest: Callable[[Tensor, Tensor, Tensor], Tensor], point: Point) -> Point:
    """Return the unit normal from four distances in a tetrahedron's corners (iquilezles.org/articles/normalsSDF)."""
    x, y, z = point
    step = _NORMAL_STEP
    total_x, total_y, total_z = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for sign_x, sign_y, sign_z in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        distance = nearest(x + sign_x * step, y + sign_y * step, z + sign_z * step)
        total_x, total_y, total_z = (
            total_x + sign_x * distance,
            total_y + sign_y * distance,
            total_z + sign_z * distance,
        )
    length = torch.sqrt(total_x**2 + total_y**2 + total_z**2 + 1e-12)
    return total_x / length, total_y / length, total_z / length


def _turn(scene: Columns) -> list[Tensor]:
    """Return the nine entries, row by row, of the head's rotation."""
    return [scene[f"turn_{entry}"] for entry in range(9)]


def _to_head(turn: list[Tensor], point: Point) -> Point:
    x, y, z = point[0], point[1] - _PIVOT_Y, point[2] - _PIVOT_Z
    return (
        turn[0] * x + turn[3] * y + turn[6] * z,
        turn[1] * x + turn[4] * y + turn[7] * z + _PIVOT_Y,
        turn[2] * x + turn[5] * y + turn[8] * z + _PIVOT_Z,
    )


def _to_body(scene: Columns, point: Point) -> Point:
    # The shoulders follow a turn of the head a little.
    cosine, sine = scene["body_cosine"], scene["body_sine"]
    x, z = point[0], point[2] - _PIVOT_Z
    return cosine * x - sine * z, point[1], sine * x + cosine * z + _PIVOT_Z


def _project(scene: Columns, points: Point, height: int, width: int) -> Tensor:
    """Return where points in head coordinates (B, F, 1, 1, N) fall in the picture: (B, F, N, 2) pixels."""
    turn = _turn(scene)
    x, y, z = points[0], points[1] - _PIVOT_Y, points[2] - _PIVOT_Z
    world_x = turn[0] * x + turn[1] * y + turn[2] * z
    world_y = turn[3] * x + turn[4] * y + turn[5] * z + _PIVOT_Y
    world_z = turn[6] * x + turn[7] * y + turn[8] * z + _PIVOT_Z
    enlarged = scene["zoom"] * _CAMERA / (_CAMERA - world_z)
    across = (world_x + scene["shift_x"]) * enlarged
    down = (world_y - _CENTRE_Y + scene["shift_y"]) * enlarged
    return torch.stack((across * height + width / 2, (down + 0.5) * height), dim=-1)[:, :, 0, 0]
