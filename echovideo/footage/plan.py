"""Which frames of a scanned file to train on, which crop of them, and which faces as references: numbers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from echovideo.faces.analyzer import FrameFace, similarity, yaw_degrees
from echovideo.faces.packs import EMBEDDED_KIND
from echovideo.footage.scan import FootageError, Scan, Sighting
from echovideo.model.config import TransformerConfig
from echovideo.request import DEFAULT_FPS, MAX_FRAMES, SIZES

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_NEIGHBOURS = 4
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FootageSettings:
    """What a training example is, and what footage must show to become one.

    `sizes`: (height, width) in pixels to choose from. `num_frames`: 8k+1, taken at about `fps` a second.
    A cut is where a frame differs by `cut_difference` from the one before and `cut_ratio` times as much as its
    neighbours do. Faces under `min_face_px` (shorter side of the box, in the file's pixels) do not count; two faces
    are one person's from `same_person` on, a faces.analyzer.similarity. A face may be missing for `max_gap` looked-at
    frames. `max_others_share`: frames with somebody else's large face, over frames with the person's.
    `max_enlarged`: how much a crop may be enlarged to its size. `num_references`: faces kept as references of a clip.
    """

    sizes: tuple[tuple[int, int], ...] = tuple(SIZES.values())
    num_frames: int = MAX_FRAMES
    fps: float = float(DEFAULT_FPS)
    cut_difference: float = 0.3
    cut_ratio: float = 3.0
    min_face_px: float = 48.0
    same_person: float = 0.3
    max_gap: int = 2
    max_others_share: float = 0.2
    max_enlarged: float = 1.5
    num_references: int = 3

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the settings of its values, which may have been through JSON."""
        return cls(**{**record, "sizes": tuple((height, width) for height, width in record["sizes"])})


def settings_for(config: TransformerConfig, pack: str) -> FootageSettings:
    """Return the settings for a model: the published sizes, or a small model's own, and what its face nets call alike.

    antelopev2 calls two photos of one person alike from about 0.3 on, dlib from 0.535 on, its own threshold.
    """
    same_person = 0.535 if pack.startswith(EMBEDDED_KIND) else 0.3
    if config.sizes == SIZES:
        return FootageSettings(same_person=same_person)
    return FootageSettings(
        sizes=tuple(config.sizes.values()),
        num_frames=config.sample_frames,
        min_face_px=24.0,
        same_person=same_person,
    )


class Seen(NamedTuple):
    """A face in one frame of the file."""

    frame_index: int
    face: FrameFace


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to take of a file.

    `frame_indices`: the example's frames. `faces` and `boxes`, one a frame: the person's face where it was seen, and
    its box, in between drawn through. `crop`: whole pixels of the file, of `height` x `width`'s shape.
    `references`: for each reference to keep, faces to try, best first. `shots`, `face_frames`: how many shots there
    are, and how many looked-at frames show the person.
    """

    frame_indices: tuple[int, ...]
    faces: tuple[FrameFace | None, ...]
    boxes: tuple[Box, ...]
    height: int
    width: int
    crop: tuple[int, int, int, int]
    references: tuple[tuple[Seen, ...], ...]
    shots: int
    face_frames: int


def plan_take(scan: Scan, settings: FootageSettings) -> Plan:
    """Return what to take: the middle of the longest run of the person's face within one shot.

    The person is whoever's face fills most of the footage, added up over its frames. Raises FootageError `no_face`,
    `several_people`, `too_short` or `too_small`.
    """
    shots = list(_shots(scan.sightings, settings))
    person, others = _people(shots, scan.pack, settings)
    if not person:
        raise FootageError(
            f"no face of {settings.min_face_px:g} px or more in {len(scan.sightings)} frames looked at; use footage "
            "that shows the person from the front, or closer",
            code="no_face",
            numbers={"frames_seen": len(scan.sightings), "min_face_px": settings.min_face_px},
        )
    share = others / len(person)
    if share > settings.max_others_share:
        raise FootageError(
            f"somebody else's face is in {others} frames, the person's in {len(person)}: it is not clear who is meant. "
            "Cut or crop the footage to one person",
            code="several_people",
            numbers={"others_frames": others, "face_frames": len(person)},
        )
    run = max(_runs(shots, person, settings.max_gap), key=len)
    if len(run) < settings.num_frames:
        raise FootageError(
            f"the longest run of the person's face within one shot is {len(run)} frames at about {settings.fps:g} a "
            f"second; {settings.num_frames} are needed. Use longer footage, or footage that stays on the person",
            code="too_short",
            numbers={"run_frames": len(run), "frames_needed": settings.num_frames, "shots": len(shots)},
        )
    start = (len(run) - settings.num_frames) // 2
    window = run[start : start + settings.num_frames]
    boxes = _boxes(window, person)
    height, width, crop = _crop(scan, boxes, settings)
    return Plan(
        frame_indices=tuple(sighting.frame_index for sighting in window),
        faces=tuple(person.get(sighting.frame_index) for sighting in window),
        boxes=boxes,
        height=height,
        width=width,
        crop=crop,
        references=tuple(_references(run, person, settings.num_references)),
        shots=len(shots),
        face_frames=len(person),
    )


def _shots(sightings: Sequence[Sighting], settings: FootageSettings) -> Iterator[Sequence[Sighting]]:
    """Yield the sightings between two cuts. Fast movement makes all neighbours differ, a cut makes one frame differ."""
    differences = np.array([sighting.difference for sighting in sightings])
    start = 0
    for at in range(1, len(sightings)):
        near = np.concatenate((differences[max(1, at - _NEIGHBOURS) : at], differences[at + 1 : at + 1 + _NEIGHBOURS]))
        usual = float(np.median(near)) if len(near) else 0.0
        if differences[at] >= max(settings.cut_difference, settings.cut_ratio * usual):
            yield sightings[start:at]
            start = at
    yield sightings[start:]


def _people(
    shots: Sequence[Sequence[Sighting]], pack: str, settings: FootageSettings
) -> tuple[dict[int, FrameFace], int]:
    """Return the person's face by frame, and in how many frames there is a large face of somebody else."""
    tracks = [track for shot in shots for track in _tracks(shot, pack, settings)]
    if not tracks:
        return {}, 0
    fills = [sum(_area(seen.face) for seen in track) for track in tracks]
    looks = [np.mean([seen.face.embedding for seen in track], axis=0) for track in tracks]

    def alike(first: int, second: int) -> bool:
        return similarity(pack, looks[first], looks[second]) >= settings.same_person

    # By everybody's largest track, how much all that look like it fill.
    people: dict[int, float] = {}
    for number in sorted(range(len(tracks)), key=lambda number: -fills[number]):
        who = next((known for known in people if alike(known, number)), number)
        people[who] = people.get(who, 0.0) + fills[number]
    main = max(people, key=lambda number: people[number])
    person: dict[int, FrameFace] = {}
    others: list[Seen] = []
    # The longest track first: whoever is seen beside it in the same frame is somebody else, however alike.
    for number in sorted(range(len(tracks)), key=lambda number: (number != main, -len(tracks[number]))):
        track = tracks[number]
        beside = any(seen.frame_index in person for seen in track)
        if number == main or (alike(main, number) and not beside):
            person |= {seen.frame_index: seen.face for seen in track}
        else:
            others += track
    large = float(np.median([_area(face) for face in person.values()])) / 4
    return person, len({seen.frame_index for seen in others if _area(seen.face) >= large})


def _tracks(shot: Sequence[Sighting], pack: str, settings: FootageSettings) -> list[list[Seen]]:
    """Return the shot's faces as tracks: each face goes to the live track that looks most like it."""
    tracks: list[list[Seen]] = []
    last_at: list[int] = []
    for at, sighting in enumerate(shot):
        for face in sighting.faces:
            if min(face.sides) < settings.min_face_px:
                continue
            alike = {
                number: similarity(pack, track[-1].face.embedding, face.embedding)
                for number, track in enumerate(tracks)
                if 1 <= at - last_at[number] <= settings.max_gap + 1
            }
            best = max(alike, key=lambda number: alike[number], default=None)
            if best is None or alike[best] < settings.same_person:
                best = len(tracks)
                tracks.append([])
                last_at.append(at)
            tracks[best].append(Seen(sighting.frame_index, face))
            last_at[best] = at
    return tracks


def _runs(
    shots: Sequence[Sequence[Sighting]], person: dict[int, FrameFace], max_gap: int
) -> Iterator[Sequence[Sighting]]:
    """Yield the stretches of each shot that begin and end with the person's face and miss it for at most `max_gap`."""
    for shot in shots:
        seen = [at for at, sighting in enumerate(shot) if sighting.frame_index in person]
        if not seen:
            continue
        start = seen[0]
        for at, after in zip(seen, [*seen[1:], len(shot) + max_gap + 1], strict=True):
            if after - at > max_gap + 1:
                yield shot[start : at + 1]
                start = after


def _boxes(window: Sequence[Sighting], person: dict[int, FrameFace]) -> tuple[Box, ...]:
    """Return the face's box in each frame, straight lines drawn between the frames where it was seen."""
    seen = [sighting.frame_index for sighting in window if sighting.frame_index in person]
    sides = np.array([person[index].box for index in seen])
    at = [sighting.frame_index for sighting in window]
    drawn = np.stack([np.interp(at, seen, side) for side in sides.T], axis=1)
    return tuple((float(row[0]), float(row[1]), float(row[2]), float(row[3])) for row in drawn)


def _crop(scan: Scan, boxes: Sequence[Box], settings: FootageSettings) -> tuple[int, int, tuple[int, int, int, int]]:
    """Return height, width and crop of the size that shows most of the face's way, and then most of the picture."""
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
    choices = []
    for height, width in settings.sizes:
        scale = min(scan.height / height, scan.width / width)
        crop_height, crop_width = round(height * scale), round(width * scale)
        x = round(min(max((left + right - crop_width) / 2, 0), scan.width - crop_width))
        y = round(min(max((top + bottom - crop_height) / 2, 0), scan.height - crop_height))
        shown = min(1.0, crop_width / (right - left)) * min(1.0, crop_height / (bottom - top))
        choices.append((shown, crop_height * crop_width, scale, height, width, (x, y, x + crop_width, y + crop_height)))
    _, _, scale, height, width, crop = max(choices)
    if scale * settings.max_enlarged < 1:
        raise FootageError(
            f"the picture is {scan.width} x {scan.height} pixels, and would be enlarged {1 / scale:.1f} times to "
            f"{width} x {height}; at most {settings.max_enlarged:g} times is allowed. Use larger footage",
            code="too_small",
            numbers={"width": scan.width, "height": scan.height, "enlarged": 1 / scale},
        )
    return height, width, crop


def _references(run: Sequence[Sighting], person: dict[int, FrameFace], count: int) -> Iterator[tuple[Seen, ...]]:
    """Yield, for each of `count` equal parts of the run, its most frontal, largest and surest faces, best first."""
    seen = [Seen(item.frame_index, person[item.frame_index]) for item in run if item.frame_index in person]
    for part in np.array_split(np.arange(len(seen)), count):
        faces = [seen[at] for at in part]
        faces.sort(key=lambda item: -_worth(item.face))
        if faces:
            yield tuple(faces[:_TRIES])


def _worth(face: FrameFace) -> float:
    return face.score * min(1.0, min(face.sides) / 112) * float(np.cos(np.radians(yaw_degrees(face.landmarks))))


def _area(face: FrameFace) -> float:
    width, height = face.sides
    return width * height
