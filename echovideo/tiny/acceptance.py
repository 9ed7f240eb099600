"""Whether the recogniser takes the tiny model's people for those of their photos.

`python -m echovideo.tiny.acceptance` renders test people as `echovideo render` does, on the CPU, from a drawn photo and
a prompt that is independent of it. The ceiling is the drawn truth after the autoencoder. The recogniser is the one that
conditions the model, so this says less than the judges do. Writes acceptance.json.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echovideo.engine import to_uint8
from echovideo.evaluation.acceptance import accepted, clip_embeddings, threshold
from echovideo.evaluation.cases import Case, draw_gallery, draw_truths, drawn_cases
from echovideo.faces.mtcnn import MtcnnDetector
from echovideo.faces.recogniser import load_recogniser
from echovideo.pipeline import EchoVideoPipeline
from echovideo.synthetic.person import SPLITS
from echovideo.synthetic.results import Row, write_results
from echovideo.tiny.autoencoder import reconstruct
from echovideo.tiny.drawing import draw_photos
from echovideo.tiny.folder import ensure_tiny
from echovideo.tiny.parts import FRAMES, SIDE

RESULTS = Path(__file__).parent / "results"
_WORLD_PEOPLE = 300
_STEPS = 25


def rendered(pipeline: EchoVideoPipeline, case: Case) -> NDArray[np.uint8]:
    """Return the clip (17, 96, 96, 3) of a case, rendered from a photo of 192 pixels."""
    photo = draw_photos([case.person], [case.reference], torch.device("cpu")).frames_BFCHW[0, 0]
    file = io.BytesIO()
    Image.fromarray((photo * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    video = pipeline(
        file.getvalue(),
        case.prompt,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=_STEPS,
        generator=torch.Generator().manual_seed(case.person),
        output_type="pt",
    ).frames
    return to_uint8(video)


def main() -> None:
    """Render, ask the recogniser, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results file")
    options = parser.parse_args()
    cases = drawn_cases()[: options.people]
    with tempfile.TemporaryDirectory() as models:
        pipeline = EchoVideoPipeline.from_pretrained(ensure_tiny(Path(models)))
    detector, recogniser = MtcnnDetector(), load_recogniser()
    truths = draw_truths(cases)
    made, ceiling = [], []
    for number, (case, truth) in enumerate(zip(cases, truths, strict=True)):
        made.append(rendered(pipeline, case))
        video = truth.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        ceiling.append(((reconstruct(pipeline.vae, video)[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())
        print(f"acceptance: {number + 1} of {len(cases)} people", file=sys.stderr, flush=True)

    def seen(clips: NDArray[np.uint8], moments: tuple[int, ...] = (0, FRAMES // 2, FRAMES - 1)) -> NDArray[np.float64]:
        return clip_embeddings(clips, detector, recogniser, moments)

    others = seen(draw_gallery(SPLITS["train"][:_WORLD_PEOPLE]).numpy(), (0,))
    world_mean = np.nanmean(others, axis=0)
    gallery, person = seen(draw_gallery([case.person for case in cases]).numpy(), (0,)), np.arange(len(cases))
    least = threshold(seen(truths.numpy()), person, gallery, world_mean)
    found = {name: seen(np.stack(clips)) for name, clips in (("rendered", made), ("ceiling", ceiling))}
    shares = {
        name: float(accepted(values, person, gallery, world_mean, least).mean()) for name, values in found.items()
    }
    rows = [Row(name=name, metric="accepted", value=share, unit="share") for name, share in shares.items()]
    rows += [
        Row(name=name, metric="a face is found", value=float(np.isfinite(values).all(axis=1).mean()), unit="share")
        for name, values in found.items()
    ]
    rows += [
        Row(
            name="rendered",
            metric="of the ceiling",
            value=shares["rendered"] / shares["ceiling"],
            unit="share",
            floor=0.6,
        ),
        Row(name="people", metric="people", value=float(len(cases)), unit="people"),
        Row(name="threshold", metric="likeness at 1 % false accepts", value=least, unit="cosine"),
    ]
    write_results("acceptance", f"{torch.get_num_threads()} CPU threads", rows, None, options.out)


if __name__ == "__main__":
    main()
