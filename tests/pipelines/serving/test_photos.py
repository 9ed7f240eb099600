"""Uploads become JPEGs of pixels alone, without a change to a JPEG's pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from echovideo.errors import PhotoRefusedError
from echovideo.faces.photo import decode_photo
from pipelines.serving.photos import clean_photo

SECRET = b"Secret"
ORIENTATION = 0x0112


def secretive(orientation: int, **settings: Any) -> bytes:
    """A photo with a camera, a place and a comment in it, and a second picture behind it."""
    picture = Image.fromarray(skimage.data.astronaut()[:200, 100:250]).convert(settings.pop("mode", "RGB"))
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif[ORIENTATION] = orientation
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.6)
    buffer = io.BytesIO()
    extra = {"comment": "SecretComment", "icc_profile": b"SecretProfile", "xmp": b"<x>SecretPlace</x>"}
    picture.save(buffer, settings.pop("format", "JPEG"), exif=exif, **extra, **settings)
    return buffer.getvalue() + b"\xff\xd8\xff\xe1SecretMotion\xff\xd9"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"progressive": True, "subsampling": 0},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"restart_marker_blocks": 3},
    ],
    ids=["baseline", "progressive", "gray", "cmyk", "restarts"],
)
def test_jpeg_keeps_every_pixel_and_nothing_else_but_how_it_is_turned(
    settings: dict[str, Any], orientation: int
) -> None:
    upload = secretive(orientation, **settings)
    assert upload.count(SECRET) == 5
    kept = clean_photo(upload)
    assert SECRET not in kept
    np.testing.assert_array_equal(decode_photo(kept), decode_photo(upload))
    with Image.open(io.BytesIO(kept)) as image:
        assert dict(image.getexif()) == ({} if orientation == 1 else {ORIENTATION: orientation})
        assert set(image.info) <= {"exif", "adobe", "adobe_transform", "progressive", "progression", "dpi"}
    assert clean_photo(kept) == kept


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_become_upright_jpegs_of_their_pixels(kind: str) -> None:
    upload = secretive(6, format=kind)
    kept = clean_photo(upload)
    assert SECRET not in kept
    with Image.open(io.BytesIO(kept)) as image:
        assert (image.format, image.size, dict(image.getexif())) == ("JPEG", (200, 150), {})
    difference = decode_photo(kept).astype(int) - decode_photo(upload)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("length", [30, 700, -40], ids=["in the head", "in the tables", "in the pixels"])
def test_jpeg_cut_short_is_refused(length: int) -> None:
    upload = clean_photo(secretive(1))
    with pytest.raises(PhotoRefusedError) as refused:
        clean_photo(upload[:length])
    assert refused.value.code == "not_an_image"
