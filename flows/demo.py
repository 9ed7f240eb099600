"""The demo: three drawn people, two prompts each, and one photo without a face, rendered as a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import skimage.data
from PIL import Image

from echovideo.request import RenderRequest
from echovideo.synthetic.draw import draw_references
from echovideo.synthetic.person import SPLITS, people
from flows.cli import app
from pipelines.manifest import write_manifest
from pipelines.storage import StoragePath

# People that no training and no measurement has seen, of light, medium and dark skin.
_PEOPLE = {"ada": 2, "ben": 3, "cleo": 6}
_PHOTO_SIDE = 384
PROMPTS = (
    "A person facing the camera, turning the head to the left, with a friendly smile on the lips, with short hair, "
    "with hair dyed blue, wearing yellow, in a T-shirt, in a green park, in warm light.",
    "A person looking to the right, talking, with long hair, with hair of a natural colour, wearing red, "
    "in a high collar, in a library, lit from the left.",
)


def write_demo(folder: Path) -> Path:
    """Write photos and a manifest of seven 96x96 rows, the last without a face, and return the manifest's path."""
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    shown = people([SPLITS["validation"][number] for number in _PEOPLE.values()])
    pictures = (draw_references(shown, side=_PHOTO_SIDE).frames_BFCHW[:, 0] * 255).round().byte()
    for name, picture in zip(_PEOPLE, pictures.permute(0, 2, 3, 1).numpy(), strict=True):
        Image.fromarray(picture).save(photos / f"{name}.png")
    Image.fromarray(skimage.data.coffee()).save(photos / "coffee.png")
    rows = [
        (f"{name}-{number}", f"{name}.png", prompt)
        for name in _PEOPLE
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
