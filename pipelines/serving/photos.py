"""Uploaded photos: checked before their pixels are decoded, and encoded anew without anything but pixels."""

from __future__ import annotations

import base64
import binascii

import cv2

from echovideo.errors import PhotoRefusedError
from echovideo.faces.photo import decode_photo

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 50_000_000
_MAX_JPEG_SIDE = 65_500
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def clean_photo(data: bytes) -> bytes:
    """Return an upload as an upright JPEG of its pixels alone: no EXIF, no place, no thumbnail, no comment.

    The same upload gives the same bytes. Raises PhotoRefusedError: `not_an_image`, `too_large`, `too_small`.
    """
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
