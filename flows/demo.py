"""The demo: two public-domain portraits, three prompts each, and one photo without a face, rendered as a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import skimage.data
from PIL import Image

from echovideo.request import RenderRequest
from flows.cli import app
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath

PROMPTS = (
    "The person smiles at the camera, in a sunlit kitchen, soft light and shallow depth of field",
    "The person turns the head slowly to the left, on a quiet beach at dawn, cinematic with film grain",
    "The person reads a letter by the window, in a warm library, gentle camera movement",
)


def write_demo(folder: Path) -> Path:
    """Write photos and a manifest of seven 96x96 rows, the last without a face, and return the manifest's path.

    The portraits are NASA's of Eileen Collins and the US Navy's of Grace Hopper, as scikit-image and matplotlib
    ship them.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    Image.fromarray(skimage.data.astronaut()).save(photos / "astronaut.png")
    Image.fromarray(skimage.data.coffee()).save(photos / "coffee.png")
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    (photos / "admiral.jpg").write_bytes(hopper.read_bytes())
    rows = [
        (f"{Path(photo).stem}-{number}", photo, prompt)
        for photo in ("astronaut.png", "admiral.jpg")
        for number, prompt in enumerate(PROMPTS, start=1)
    ]
    rows.append(("no-face", "coffee.png", PROMPTS[0]))
    manifest = folder / "manifest.parquet"
    write_manifest(
        [
            RenderRequest(
                row_id=row_id,
                prompt=prompt,
                photo_uri=f"photos/{photo}",
                height=96,
                width=96,
                num_frames=17,
                num_inference_steps=25,
            )
            for row_id, photo, prompt in rows
        ],
        StoragePath.parse(str(manifest)),
    )
    return manifest


def main() -> None:
    """Write the demo into the folder named on the command line, demo/ by default, and render it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    manifest = write_demo(folder)
    app(["batch", "run", str(manifest), str(folder / "output"), "--model", "tiny"])


if __name__ == "__main__":
    main()
