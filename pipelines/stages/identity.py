"""Identity stage: reads a row's photo and turns it into an identity, once per photo and run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Self

from echovideo.faces.analyzer import FaceAnalyzer, Identity
from echovideo.faces.packs import open_pack
from echovideo.faces.photo import MAX_BYTES, decode_photo
from pipelines.config import RunConfig
from pipelines.ledger import Claim
from pipelines.photo_reader import read_photo
from pipelines.stages.row import Row
from pipelines.stages.stage import Stage

_REMEMBERED = 256


class IdentityStage(Stage):
    """Photo digest, then identity. The run's own prefix keeps identities by photo digest, and small pictures by row."""

    name = "identity"

    def __init__(self, config: RunConfig, epoch: int) -> None:
        super().__init__(config, epoch)
        self.analyzer = FaceAnalyzer(open_pack(Path(config.model) / "face_encoder"))
        self.identities: OrderedDict[str, bytes] = OrderedDict()

    def for_run(self, config: RunConfig, epoch: int) -> Self:
        """Return this stage for another run, which remembers nobody whom the first one saw."""
        other = super().for_run(config, epoch)
        other.identities = OrderedDict()
        return other

    def work(self, row: Row, claim: Claim) -> Row:
        """Return the row with its photo's identity; raises PhotoRefusedError or StorageError."""
        photo = row.request.photo_bytes
        if photo is None:
            assert row.request.photo_uri is not None
            photo = read_photo(row.request.photo_uri, self.config.uri_policy, self.config.storage, MAX_BYTES)
        # The picture comes first, because a refused photo is the one that people most want to see in the report.
        self.keep_picture("photos", row, decode_photo(photo))
        identity = self._identity(photo, hashlib.sha256(photo).hexdigest())
        self.keep_picture("faces", row, Identity.from_bytes(identity).face_image)
        return replace(row, identity=identity)

    def _identity(self, photo: bytes, photo_sha256: str) -> bytes:
        if photo_sha256 in self.identities:
            self.identities.move_to_end(photo_sha256)
            return self.identities[photo_sha256]
        stored = self.ledger.folder / "identities" / f"{photo_sha256}.safetensors"
        if stored.exists():
            data = stored.read_bytes()
        else:
            identity: Identity = self.analyzer.analyze(photo, policy=self.config.several_faces)
            data = identity.to_bytes()
            stored.write_bytes(data)
        self.identities[photo_sha256] = data
        if len(self.identities) > _REMEMBERED:
            self.identities.popitem(last=False)
        return data
