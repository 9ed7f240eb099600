"""What real face nets see in the tiny model's videos: the person of the photo, and the tone of their skin.

`python -m echovideo.tiny.real_nets` renders test people as `make demo` does, on the CPU, from a drawn photo and
a prompt that is independent of it. The ceiling is the drawn truth after the autoencoder. The recogniser is the one that
conditions the model, so this says less than the judges do. Photographs that are named are rendered too: their skin's
lightness beside the video's, in real_nets.jpg as a swatch before the frames. Writes real_nets.json.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.engine import to_uint8
from echovideo.errors import PhotoRefusedError
from echovideo.evaluation.acceptance import accepted, clip_embeddings, threshold
from echovideo.evaluation.cases import Case, draw_gallery, draw_truths, drawn_cases
from echovideo.evaluation.statistics import Numbers
from echovideo.evaluation.tone import clip_lightness, lightness, skin_colour
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import load_recogniser
from echovideo.pipeline import EchoVideoPipeline
from echovideo.results import Row, machine_name, write_results
from echovideo.synthetic.person import SPLITS
from echovideo.tiny.autoencoder import reconstruct
from echovideo.tiny.drawing import draw_photos
from echovideo.tiny.folder import ensure_tiny
from echovideo.tiny.parts import FRAMES, SIDE

RESULTS = Path(__file__).parent / "results"
_WORLD_PEOPLE = 300
_STEPS = 25
_MOMENTS = (0, FRAMES // 2, FRAMES - 1)
_PROMPT = (
    "A person facing the camera, keeping still, with short hair, wearing blue, in a T-shirt, in front of a plain wall, "
    "lit from the front, in white light."
)


def rendered(pipeline: EchoVideoPipeline, photo: bytes, prompt: str, seed: int) -> NDArray[np.uint8]:
    """Return the clip (17, 96, 96, 3) of a photo and a prompt."""
    video = pipeline(
        photo,
        prompt,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=_STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames
    return to_uint8(video)


def measure_people(pipeline: EchoVideoPipeline, cases: Sequence[Case]) -> list[Row]:
    """Return how many of the cases' people the recogniser accepts, and how their skin's lightness follows the truth.

    People whose photo is refused are counted, and left out of all else.
    """
    detector, recogniser = MtcnnDetector(), load_recogniser()
    taken, made, ceiling = [], [], []
    all_truths = draw_truths(cases)
    for number, (case, truth) in enumerate(zip(cases, all_truths, strict=True)):
        try:
            made.append(rendered(pipeline, _drawn_photo(case), case.prompt, case.person))
        except PhotoRefusedError as error:
            print(f"real nets: the photo of person {case.person} is refused: {error}", file=sys.stderr, flush=True)
            continue
        taken.append(number)
        video = truth.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        ceiling.append(((reconstruct(pipeline.vae, video)[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
        print(f"real nets: {number + 1} of {len(cases)} people", file=sys.stderr, flush=True)
    refused, cases, truths = len(cases) - len(taken), [cases[number] for number in taken], all_truths[taken]
    clips = {"rendered": np.stack(made), "ceiling": np.stack(ceiling)}

    def seen(pictures: NDArray[np.uint8], moments: Sequence[int] = _MOMENTS) -> Numbers:
        return clip_embeddings(pictures, detector, recogniser, moments)

    world_mean = np.nanmean(seen(draw_gallery(SPLITS["train"][:_WORLD_PEOPLE]).numpy(), (0,)), axis=0)
    gallery, person = seen(draw_gallery([case.person for case in cases]).numpy(), (0,)), np.arange(len(cases))
    least = threshold(seen(truths.numpy()), person, gallery, world_mean)
    shares = {name: accepted(seen(shown), person, gallery, world_mean, least).mean() for name, shown in clips.items()}
    true_tone = clip_lightness(truths.numpy(), detector, _MOMENTS)
    tones = {name: clip_lightness(shown, detector, _MOMENTS) for name, shown in clips.items()}
    rows = [
        Row(name="people", metric="number", value=float(len(cases)), unit="people"),
        Row(name="people", metric="photos refused", value=float(refused), unit="people"),
        Row(name="people", metric="likeness at 1 % false accepts", value=least, unit="cosine"),
        *(Row(name=name, metric="accepted", value=float(share), unit="share") for name, share in shares.items()),
        Row(
            name="rendered",
            metric="accepted, of the ceiling",
            value=float(shares["rendered"] / shares["ceiling"]),
            unit="share",
            floor=0.6,
        ),
    ]
    for name, tone in tones.items():
        both = np.isfinite(tone) & np.isfinite(true_tone)
        slope = float(np.polyfit(true_tone[both], tone[both], 1)[0])
        thirds = np.array_split(np.argsort(true_tone[both]), 3)
        rows += [
            Row(name=name, metric="faces found", value=float(np.isfinite(tone).mean()), unit="share"),
            Row(
                name=name,
                metric="slope of the skin's L* on the truth's",
                value=slope,
                unit="slope",
                floor=0.9 if name == "rendered" else None,
            ),
            *(
                Row(
                    name=name,
                    metric=f"skin's L* too high, {third} third",
                    value=float((tone - true_tone)[both][places].mean()),
                    unit="L*",
                )
                for third, places in zip(("dark", "middle", "light"), thirds, strict=True)
            ),
        ]
    return rows


def measure_photos(pipeline: EchoVideoPipeline, photos: Sequence[Path]) -> tuple[list[Row], Image.Image]:
    """Return the skin's lightness of photographs and of their videos, and a picture of both."""
    detector = MtcnnDetector()
    rows, lines = [], []
    for path in photos:
        photo = np.asarray(Image.open(path).convert("RGB"))
        (boxes, points), *_ = detector.detect_batch(photo[None])
        largest = int(np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
        clip = rendered(pipeline, path.read_bytes(), _PROMPT, seed=0)
        colour, made = skin_colour(photo, points[largest]), clip_lightness(clip[None], detector, _MOMENTS)
        rows += [
            Row(name=path.stem, metric="photograph's skin", value=lightness(colour), unit="L*"),
            Row(name=path.stem, metric="video's skin", value=float(made[0]), unit="L*"),
        ]
        lines.append(np.concatenate([np.broadcast_to(colour, (SIDE, SIDE, 3)), *clip[list(_MOMENTS)]], axis=1))
    return rows, Image.fromarray(np.concatenate(lines))


def _drawn_photo(case: Case) -> bytes:
    photo = draw_photos([case.person], [case.reference], torch.device("cpu")).frames_BFCHW[0, 0]
    file = io.BytesIO()
    Image.fromarray((photo * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Render, ask the nets, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="*", help="photographs of real people")
    parser.add_argument("--people", type=int, default=100, help="drawn people")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results file and picture")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models:
        pipeline = EchoVideoPipeline.from_pretrained(ensure_tiny(Path(models)))
    rows: list[Row] = []
    if options.photos:
        rows, picture = measure_photos(pipeline, options.photos)
        picture.save(options.out / "real_nets.jpg", quality=90)
    rows += measure_people(pipeline, drawn_cases()[: options.people])
    write_results("real_nets", rows, options.out, machine=machine_name("cpu"))


if __name__ == "__main__":
    main()
