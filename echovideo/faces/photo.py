"""Photos as people have them, turned into plain RGB pixels."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from echovideo.errors import PhotoRefusedError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 64

# What cameras, phones and browsers write. Pillow's other readers are not reachable from a stranger's bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, EOFError, ValueError, SyntaxError, RuntimeError, struct.error)


def decode_photo(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the photo as RGB uint8 (H, W, 3), turned upright by its EXIF orientation.

    Transparent pixels are laid over black, the colour of whatever is not the face. 16-bit values keep their upper 8
    bits; of an animation the first frame is taken. Raises as `open_photo`.
    """
    with open_photo(data, max_bytes=max_bytes, max_pixels=max_pixels) as image:
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def open_photo(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFile.ImageFile]:
    """Open a photo whose head says that it is one and how large; no pixel is decoded before its user asks for them.

    Raises PhotoRefusedError, also for what its user finds damaged: `not_an_image` (unknown format, damaged or cut
    short), `too_large`, `too_small`.
    """
    if len(data) > max_bytes:
        raise PhotoRefusedError(
            f"the photo file has {len(data)} bytes; at most {max_bytes} are read. Save it smaller",
            code="too_large",
            numbers={"bytes": len(data), "max_bytes": max_bytes},
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that are refused right after.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(*image.size, max_pixels)
                yield image
    except Image.DecompressionBombError as error:
        raise PhotoRefusedError(
            f"the photo has too many pixels; at most {max_pixels} are read. Scale it down",
            code="too_large",
            numbers={"max_pixels": max_pixels},
        ) from error
    except _DAMAGED as error:
        # Pillow says of an unknown format where in memory it was read.
        why = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise PhotoRefusedError(
            f"the photo ({len(data)} bytes) cannot be read as an image: {why}. Save it again as JPEG or PNG",
            code="not_an_image",
            numbers={"bytes": len(data)},
        ) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PhotoRefusedError(
            f"the photo has {width} x {height} pixels; at most {max_pixels} are read. Scale it down",
            code="too_large",
            numbers={"width": width, "height": height, "max_pixels": max_pixels},
        )
    if min(width, height) < MIN_SIDE:
        raise PhotoRefusedError(
            f"the photo has {width} x {height} pixels; each side needs {MIN_SIDE}. Use a larger one",
            code="too_small",
            numbers={"width": width, "height": height, "min_side": MIN_SIDE},
        )


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grayscale instead of scaling it.
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB"))
