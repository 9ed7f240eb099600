"""Uploaded photos: checked by their heads, and kept as JPEGs of pixels and nothing else."""

from __future__ import annotations

import base64
import binascii
import re

import cv2
from PIL.ExifTags import Base

from echovideo.errors import PhotoRefusedError
from echovideo.faces.photo import decode_photo, open_photo

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 50_000_000
_MAX_JPEG_SIDE = 65_500
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)

_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""What begins a JPEG's segment. In a scan, 0xFF is also followed by 0 (a sample) or 0xD0 to 0xD7 (a restart)."""
_START_OF_SCAN, _END, _ADOBE = 0xDA, 0xD9, 0xEE
_PICTURE = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xE0)})
"""Segments that pixels are decoded from: frames, scans, and their tables."""
_TURNED = b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0"
"""An EXIF segment that says how the picture is to be turned, and no more."""


def clean_photo(data: bytes) -> bytes:
    """Return an upload as a JPEG of its pixels alone: no EXIF but how to turn it, no place, no thumbnail, no comment.

    A JPEG keeps its pixels to the bit, and none of them is decoded; what is found damaged only then is refused by the
    identity stage. Other formats are encoded anew. The same upload gives the same bytes.
    Raises PhotoRefusedError: `not_an_image`, `too_large`, `too_small`.
    """
    with open_photo(data, max_bytes=MAX_UPLOAD_BYTES, max_pixels=MAX_UPLOAD_PIXELS) as image:
        # MPO is a JPEG with further pictures behind it.
        if image.format in ("JPEG", "MPO"):
            return _without_metadata(data, image.getexif().get(Base.Orientation, 1))
    pixels = decode_photo(data, max_bytes=MAX_UPLOAD_BYTES, max_pixels=MAX_UPLOAD_PIXELS)
    if max(pixels.shape) > _MAX_JPEG_SIDE:
        raise PhotoRefusedError(
            f"the photo's longer side has {max(pixels.shape)} pixels; at most {_MAX_JPEG_SIDE} are read. Scale it down",
            code="too_large",
            numbers={"max_side": _MAX_JPEG_SIDE},
        )
    # Not Pillow's encoder, which keeps every other thread waiting while it works.
    done, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _JPEG)
    assert done
    return jpeg.tobytes()


def _without_metadata(jpeg: bytes, orientation: int) -> bytes:
    """Return the first picture of a JPEG file, with the segments that its pixels need; raises ValueError if cut short.

    Segments: ITU-T T.81, annex B. Adobe's says how colours are stored, and so belongs to the pixels.
    """
    kept = [b"\xff\xd8"]
    if orientation in range(2, 9):
        kept.append(_TURNED % orientation)
    at, in_scan = 2, False
    while found := _MARKER.search(jpeg, at):
        if in_scan:
            kept.append(jpeg[at : found.start()])
        marker = found[1][0]
        if marker == _END:
            return b"".join([*kept, b"\xff\xd9"])
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
        segment = jpeg[found.end() : at]
        if marker in _PICTURE:
            kept += [b"\xff", found[1], segment]
        elif marker == _ADOBE and segment[2:7] == b"Adobe":
            kept += [b"\xff\xee\x00\x0e", segment[2:14]]
        in_scan = marker == _START_OF_SCAN
    raise ValueError("it is cut short")


def photo_of_text(text: str) -> bytes:
    """Return the photo that a JSON body carries as base64 or as a data: address; raises PhotoRefusedError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PhotoRefusedError(
            f"the photo is not base64 ({error}); send base64, a data: address, or multipart", code="not_an_image"
        ) from error


def data_url(jpeg: bytes) -> str:
    """Return a JPEG as a data: address."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
