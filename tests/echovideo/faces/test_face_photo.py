from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from echovideo.errors import PhotoRefusedError
from echovideo.faces.photo import decode_photo

_PIXELS = skimage.data.astronaut()[:200, :160]
_GRAY = np.asarray(Image.fromarray(_PIXELS).convert("L"))


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "TIFF", 0),
        ("RGB", "BMP", 0),
        ("RGB", "WEBP", 4),
        ("RGB", "AVIF", 4),
        ("RGB", "JPEG", 4),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 6),
        ("P", "GIF", 6),
        ("CMYK", "JPEG", 4),
    ],
)
def test_decode_photo_of_a_colour_mode_gives_the_same_colours(mode: str, kind: str, tolerance: float) -> None:
    image = Image.fromarray(_PIXELS)
    pixels = decode_photo(_encode(image.quantize() if mode == "P" else image.convert(mode), kind))
    assert pixels.shape == (200, 160, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - _PIXELS).mean() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_decode_photo_of_a_grayscale_mode_gives_equal_channels(mode: str) -> None:
    pixels = decode_photo(_encode(Image.fromarray(_PIXELS).convert(mode)))
    np.testing.assert_array_equal(pixels, np.repeat(_GRAY[:, :, None], 3, axis=2))


def test_decode_photo_of_one_bit_gives_black_and_white() -> None:
    assert set(np.unique(decode_photo(_encode(Image.fromarray(_PIXELS).convert("1"))))) == {0, 255}


def test_decode_photo_of_16_bit_grayscale_keeps_the_upper_bits() -> None:
    pixels = decode_photo(_encode(Image.fromarray(_GRAY.astype(np.uint16) * 257)))
    np.testing.assert_array_equal(pixels, np.repeat(_GRAY[:, :, None], 3, axis=2))


def test_decode_photo_of_16_bit_colour_keeps_the_upper_bits() -> None:
    written, data = cv2.imencode(".png", _PIXELS[:, :, ::-1].astype(np.uint16) * 257)
    assert written
    np.testing.assert_array_equal(decode_photo(data.tobytes()), _PIXELS)


def test_decode_photo_with_transparency_is_laid_over_black() -> None:
    alpha = np.zeros((200, 160, 1), dtype=np.uint8)
    alpha[:, 80:] = 255
    pixels = decode_photo(_encode(Image.fromarray(np.concatenate((_PIXELS, alpha), axis=2))))
    assert pixels[:, :80].max() == 0
    np.testing.assert_array_equal(pixels[:, 80:], _PIXELS[:, 80:])


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, _PIXELS),
        (2, _PIXELS[:, ::-1]),
        (3, _PIXELS[::-1, ::-1]),
        (4, _PIXELS[::-1]),
        (5, _PIXELS.transpose(1, 0, 2)),
        (6, np.rot90(_PIXELS, 1)),
        (7, _PIXELS.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90(_PIXELS, -1)),
    ],
)
def test_decode_photo_with_exif_orientation_is_turned_upright(orientation: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_photo(_encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    np.testing.assert_array_equal(pixels, _PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_decode_photo_cut_short_is_refused(kind: str) -> None:
    whole = _encode(Image.fromarray(_PIXELS), kind)
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(whole[: len(whole) * 2 // 3])
    assert refusal.value.code == "not_an_image"
    assert refusal.value.numbers == {"bytes": len(whole) * 2 // 3}


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", b"<svg width='99' height='99'/>"]
)
def test_decode_photo_of_no_photo_format_is_refused(data: bytes) -> None:
    with pytest.raises(PhotoRefusedError, match="Save it again as JPEG or PNG") as refusal:
        decode_photo(data)
    assert refusal.value.code == "not_an_image"


def test_decode_photo_of_32_bit_pixels_is_refused() -> None:
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(_encode(Image.fromarray(_GRAY.astype(np.float32)), "TIFF"))
    assert refusal.value.code == "not_an_image"


def test_decode_photo_above_the_byte_limit_is_refused() -> None:
    data = _encode(Image.fromarray(_PIXELS))
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(data, max_bytes=len(data) - 1)
    assert refusal.value.code == "too_large"
    assert refusal.value.numbers == {"bytes": len(data), "max_bytes": len(data) - 1}


def test_decode_photo_above_the_pixel_limit_is_refused() -> None:
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(_encode(Image.fromarray(_PIXELS)), max_pixels=31_999)
    assert refusal.value.code == "too_large"
    assert refusal.value.numbers == {"width": 160, "height": 200, "max_pixels": 31_999}


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decode_photo_of_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    assert refusal.value.code == "too_large"
    assert refusal.value.numbers["max_pixels"] == 64_000_000


def test_decode_photo_below_the_smallest_side_is_refused() -> None:
    with pytest.raises(PhotoRefusedError) as refusal:
        decode_photo(_encode(Image.fromarray(_PIXELS[:63])))
    assert refusal.value.code == "too_small"
    assert refusal.value.numbers == {"width": 160, "height": 63, "min_side": 64}
