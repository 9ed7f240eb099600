"""Measures whether the embedded face nets see drawn people as people: `python -m echovideo.synthetic.check`.

Writes results/check.json and results/people.png beside this file. Everything comes from fixed seeds; the people are
the test split's, the mean embedding is of validation people.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.faces.analyzer import recognition_crop
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import DlibFaceRecogniser, load_recogniser
from echovideo.synthetic.clip import CURVES, MAX_YAW_DEGREES, sample_conditions, scene_curves
from echovideo.synthetic.draw import draw_references, draw_tensors
from echovideo.synthetic.person import SPLITS, Person, people

RESULTS = Path(__file__).parent / "results"
DETECTION_FLOOR, VERIFICATION_FLOOR, TONE_FLOOR = 0.95, 0.98, 0.97
POINT_TOLERANCE = 0.25
CLIPS, FRAMES = 2, 3
_CHUNK = 8
_TONES = ("light", "medium", "dark")


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


def verification_auc(
    sightings: Sightings, mean: NDArray[np.float32], tone: tuple[float, float] = (0.0, 1.0)
) -> float:
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


def measure(count: int) -> list[dict[str, object]]:
    """Return the result rows for `count` test people."""
    detector, recogniser = MtcnnDetector(), load_recogniser()
    split = SPLITS["test"]
    sightings = look_at(people(split[:count]), detector, recogniser)
    others = look_at(people(SPLITS["validation"][: count // 2]), detector, recogniser, clips=1)
    mean = others.embeddings[others.found].mean(axis=0)

    def row(name: str, metric: str, value: float, floor: float | None) -> dict[str, object]:
        return {"name": name, "metric": metric, "value": value, "unit": "", "floor": floor, "against": {}}

    turned = np.abs(sightings.yaw)
    rows = [row("all", "points within a quarter eye distance", float(sightings.seen.mean()), DETECTION_FLOOR)]
    for low in (0, 10, 20):
        inside = (turned >= low) & (turned < (low + 10 if low < 20 else MAX_YAW_DEGREES + 1))
        rows.append(row(f"yaw from {low}", "points within a quarter eye distance", float(sightings.seen[inside].mean()), None))
    rows.append(row("all", "verification AUC", verification_auc(sightings, mean), VERIFICATION_FLOOR))
    for number, name in enumerate(_TONES):
        tone = number / 3, (number + 1) / 3
        inside = (sightings.melanin >= tone[0]) & (sightings.melanin <= tone[1])
        rows.append(row(name, "points within a quarter eye distance", float(sightings.seen[inside].mean()), None))
        rows.append(row(name, "verification AUC", verification_auc(sightings, mean, tone), TONE_FLOOR))
    return rows


def write_results(benchmark: str, machine: str, rows: Sequence[dict[str, object]]) -> Path:
    """Write one results file beside this module and return its path."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    record = {
        "benchmark": benchmark,
        "machine": machine,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def main() -> None:
    """Measure, print a table, write the results and the contact sheet; exit with 1 if a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=200)
    count: int = parser.parse_args().people
    rows = measure(count)
    for entry in rows:
        floor = "" if entry["floor"] is None else f"  (at least {entry['floor']})"
        print(f"{entry['name']:12} {entry['metric']:38} {entry['value']:.4f}{floor}")
    path = write_results("check", f"{torch.get_num_threads()} CPU threads", rows)
    contact_sheet(people(SPLITS["test"][:8])).save(RESULTS / "people.png")
    print(f"wrote {path}")
    if any(entry["floor"] is not None and entry["value"] < entry["floor"] for entry in rows):  # type: ignore[operator]
        raise SystemExit(1)


if __name__ == "__main__":
    main()
