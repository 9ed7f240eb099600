"""Measures whether the embedded face nets see drawn people as people: `python -m echovideo.synthetic.check`.

Writes results/check.json and results/people.jpg beside this file. Everything comes from fixed seeds; the people are
the test split's, the mean embedding is of validation people.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.faces.analyzer import recognition_crop
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import DlibFaceRecogniser, load_recogniser
from echovideo.results import Row, machine_name, reaches, write_results
from echovideo.synthetic import RESULTS
from echovideo.synthetic.clip import CURVES, sample_conditions, scene_curves
from echovideo.synthetic.draw import draw_references, draw_tensors
from echovideo.synthetic.person import SPLITS, Person, people

DETECTION_FLOOR, VERIFICATION_FLOOR, TONE_FLOOR = 0.95, 0.98, 0.97
POINT_TOLERANCE = 0.25
CLIPS, FRAMES = 2, 3
_CHUNK = 8
_TONES = ("light", "medium", "dark")
# The first people of the split were looked at while the drawing was tuned to these very bars.
_UNSEEN = SPLITS["test"][10_000:]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sightings:
    """What the face nets made of N frames.

    `person`, `clip` int (N,) say whose frame it is, in which of the person's clips; `melanin`, `yaw` (N,) the truth;
    `seen` bool (N,): a face was found and its five points lie, on average, within a quarter of the true eye distance.
    `embeddings` float32 (N, 128), zeros where no face was found at all; `found` bool (N,).
    """

    person: NDArray[np.int64]
    clip: NDArray[np.int64]
    melanin: NDArray[np.float64]
    yaw: NDArray[np.float64]
    found: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    embeddings: NDArray[np.float32]


@torch.inference_mode()
def look_at(
    shown: Sequence[Person], detector: MtcnnDetector, recogniser: DlibFaceRecogniser, clips: int = CLIPS
) -> Sightings:
    """Return what the nets see in `clips` random clips of each person, FRAMES frames each."""
    clip_people = [person for person in shown for _ in range(clips)]
    seeds = [person.seed * 8 + clip for person in shown for clip in range(clips)]
    scene = scene_curves(sample_conditions(seeds), FRAMES)
    identity = torch.tensor([person.parameters for person in clip_people])
    found, seen, embeddings = [], [], []
    for start in range(0, len(clip_people), _CHUNK):
        drawn = draw_tensors(identity[start : start + _CHUNK], scene[start : start + _CHUNK], 96, 96)
        pictures = as_bytes(drawn.frames_BFCHW.flatten(0, 1))
        truth = drawn.landmarks_BF52.flatten(0, 1).numpy()
        for picture, points, (boxes, detected) in zip(pictures, truth, detector.detect_batch(pictures), strict=True):
            found.append(len(boxes) > 0)
            if not found[-1]:
                seen.append(False)
                embeddings.append(np.zeros(128, dtype=np.float32))
                continue
            error = np.linalg.norm(detected[0] - points, axis=1).mean()
            seen.append(bool(error < POINT_TOLERANCE * np.linalg.norm(points[0] - points[1])))
            crop = torch.from_numpy(recognition_crop(picture, detected[0])).permute(2, 0, 1)[None]
            embeddings.append(recogniser((crop.float() - 127.5) / 127.5)[0].numpy())
    number = np.arange(len(clip_people)) // clips
    return Sightings(
        person=np.repeat(number, FRAMES),
        clip=np.repeat(np.arange(len(clip_people)) % clips, FRAMES),
        melanin=np.repeat([person["melanin"] for person in clip_people], FRAMES),
        yaw=scene[:, :, CURVES.index("yaw")].flatten().double().numpy(),
        found=np.array(found),
        seen=np.array(seen),
        embeddings=np.stack(embeddings),
    )


def verification_auc(sightings: Sightings, mean: NDArray[np.float32], tone: tuple[float, float] = (0.0, 1.0)) -> float:
    """Return the chance that two clips of one person look more alike than clips of two, both of `tone` in melanin.

    Likeness is the cosine of embeddings less `mean`. Genuine pairs are of different clips, so that nothing but the
    person is shared.
    """
    chosen = sightings.found & (sightings.melanin >= tone[0]) & (sightings.melanin <= tone[1])
    centred = sightings.embeddings[chosen] - mean
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    likeness = centred @ centred.T
    person, clip = sightings.person[chosen], sightings.clip[chosen]
    upper = np.triu(np.ones_like(likeness, dtype=np.bool_), 1)
    same = person[:, None] == person[None]
    genuine = np.sort(likeness[upper & same & (clip[:, None] != clip[None])])
    impostor = np.sort(likeness[upper & ~same])
    below = np.searchsorted(impostor, genuine, "left") + np.searchsorted(impostor, genuine, "right")
    return float(below.mean() / (2 * len(impostor)))


def as_bytes(frames_BCHW: torch.Tensor) -> NDArray[np.uint8]:
    """Return frames as uint8 (B, H, W, 3)."""
    pixels: NDArray[np.uint8] = (frames_BCHW.permute(0, 2, 3, 1) * 255).round().byte().contiguous().cpu().numpy()
    return pixels


def contact_sheet(shown: Sequence[Person], side: int = 96, columns: int = 8) -> Image.Image:
    """Return one row a person: the reference, then a frame of each of seven random clips."""
    sheet = Image.new("RGB", (columns * side, len(shown) * side))
    for row, person in enumerate(shown):
        conditions = sample_conditions([person.seed * 8 + clip for clip in range(columns - 1)])
        identity = torch.tensor([person.parameters] * (columns - 1))
        with torch.inference_mode():
            clips = draw_tensors(identity, scene_curves(conditions, 3)[:, 1:2], side, side)
            tiles = torch.cat((draw_references([person], side=side).frames_BFCHW, clips.frames_BFCHW))[:, 0]
        for column, tile in enumerate(as_bytes(tiles)):
            sheet.paste(Image.fromarray(tile), (column * side, row * side))
    return sheet


def measure(count: int) -> list[Row]:
    """Return the result rows for `count` test people."""
    detector, recogniser = MtcnnDetector(), load_recogniser()
    sightings = look_at(people(_UNSEEN[:count]), detector, recogniser)
    others = look_at(people(SPLITS["validation"][: count // 2]), detector, recogniser, clips=1)
    mean = others.embeddings[others.found].mean(axis=0)

    def seen(name: str, chosen: NDArray[np.bool_], floor: float | None = None) -> Row:
        value = float(sightings.seen[chosen].mean())
        return Row(name=name, metric="found with its points", value=value, unit="share", floor=floor)

    def told_apart(name: str, tone: tuple[float, float], floor: float) -> Row:
        value = verification_auc(sightings, mean, tone)
        return Row(name=name, metric="verification", value=value, unit="AUC", floor=floor)

    turned = np.abs(sightings.yaw)
    rows = [seen("all", turned >= 0, DETECTION_FLOOR)]
    for low, high in ((0, 10), (10, 20), (20, 90)):
        rows.append(seen(f"yaw from {low} degrees", (turned >= low) & (turned < high)))
    rows.append(told_apart("all", (0.0, 1.0), VERIFICATION_FLOOR))
    for number, name in enumerate(_TONES):
        tone = number / 3, (number + 1) / 3
        rows.append(seen(f"{name} skin", (sightings.melanin >= tone[0]) & (sightings.melanin <= tone[1])))
        rows.append(told_apart(f"{name} skin", tone, TONE_FLOOR))
    return rows


def main() -> None:
    """Measure, print a table, write the results and the contact sheet; exit with 1 if a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=200)
    count: int = parser.parse_args().people
    rows = measure(count)
    write_results("check", rows, RESULTS, machine=machine_name("cpu"))
    contact_sheet(people(_UNSEEN[:8])).save(RESULTS / "people.jpg", quality=88)
    if not reaches(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
