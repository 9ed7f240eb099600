"""A picture of what the face step saw in a photo."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from echovideo.faces.analyzer import Identity
from echovideo.faces.templates import FACE_SIDE

_TEXT_WIDTH = 320
_BOX_COLOUR, _POINT_COLOUR, _TEXT_COLOUR = (80, 220, 120), (255, 80, 80), (235, 235, 235)


def draw_identity(photo: NDArray[np.uint8], identity: Identity) -> Image.Image:
    """Return a 512 px high picture: the photo (H, W, 3) with box and points, the masked face, the numbers as text."""
    scale = FACE_SIDE / photo.shape[0]
    width = max(1, round(photo.shape[1] * scale))
    sheet = Image.new("RGB", (width + FACE_SIDE + _TEXT_WIDTH, FACE_SIDE))
    sheet.paste(Image.fromarray(photo).resize((width, FACE_SIDE), Image.Resampling.LANCZOS))
    sheet.paste(Image.fromarray(identity.face_image), (width, 0))

    draw = ImageDraw.Draw(sheet)
    draw.rectangle([coordinate * scale for coordinate in identity.box], outline=_BOX_COLOUR, width=3)
    for x, y in identity.landmarks * scale:
        draw.circle((float(x), float(y)), 4, fill=_POINT_COLOUR)
    font = ImageFont.load_default(15)
    for line, (name, value) in enumerate(_numbers(identity).items()):
        draw.text((width + FACE_SIDE + 16, 16 + 26 * line), name, fill=_TEXT_COLOUR, font=font)
        draw.text((width + FACE_SIDE + 110, 16 + 26 * line), value, fill=_TEXT_COLOUR, font=font)
    return sheet


def _numbers(identity: Identity) -> dict[str, str]:
    left, top, right, bottom = identity.box
    quality = identity.quality
    return {
        "face": f"{right - left:.0f} x {bottom - top:.0f} px",
        "detection": f"{quality.detection_score:.3f}",
        "sharpness": f"{quality.sharpness:.3f}",
        "yaw": f"{quality.yaw_degrees:+.0f} degrees",
        "embedding": f"{len(identity.embedding)}, norm {float(np.linalg.norm(identity.embedding)):.2f}",
        "nets": identity.pack,
        "photo": identity.photo_sha256[:16],
    }
