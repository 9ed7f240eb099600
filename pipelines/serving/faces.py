"""The face check: a replica with the face nets alone, so that a photo is checked while every renderer is at work."""

from __future__ import annotations

import asyncio
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.ExifTags import Base

from echovideo.errors import PhotoRefusedError
from echovideo.faces.photo import open_photo
from pipelines.serving.config import ServiceConfig
from pipelines.serving.photos import data_url

if TYPE_CHECKING:
    from echovideo.faces.analyzer import Identity


class FaceCheck:
    """Says what the identity stage will see in a photo, and keeps nothing of it."""

    def __init__(self, config: ServiceConfig) -> None:
        # Imported here because torch takes seconds to load and only this replica and the renderers need it.
        from echovideo.faces.analyzer import FaceAnalyzer
        from echovideo.faces.packs import open_pack

        self.policy = config.several_faces
        self.analyzer = FaceAnalyzer(open_pack(Path(config.model) / "face_encoder"))
        self._one_at_a_time = asyncio.Lock()

    def nets(self) -> str:
        """Return the name of the nets, which is part of every video's key."""
        return self.analyzer.pack.name

    async def check(self, photo: bytes) -> dict[str, Any]:
        """Return the identity document of a cleaned photo; see the service's OpenAPI."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._check, photo)

    def _check(self, photo: bytes) -> dict[str, Any]:
        with open_photo(photo) as image:
            # From 5 on, an orientation lays the picture on its side.
            lying = image.getexif().get(Base.Orientation, 1) >= 5
            width, height = reversed(image.size) if lying else image.size
        document = {
            "object": "identity",
            "photo": {"width": width, "height": height},
            "face_nets": self.analyzer.pack.name,
        }
        try:
            identity = self.analyzer.analyze(photo, policy=self.policy)
        except PhotoRefusedError as error:
            refusal = {"code": error.code, "message": error.message, "numbers": error.numbers}
            return {**document, "usable": False, "refusal": refusal, "box": None, "quality": None, "crop": None}
        return {
            **document,
            "usable": True,
            "refusal": None,
            "box": [float(side) for side in identity.box],
            "quality": asdict(identity.quality),
            "crop": _crop(identity),
        }


def _crop(identity: Identity) -> str:
    buffer = io.BytesIO()
    Image.fromarray(identity.face_image).save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue())
