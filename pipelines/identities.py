"""Registered identities: adapters that learned one person, each under a name that a request can ask for.

    <output root>/identities/<name>/card.json                        IdentityCard; written last, and only if absent
    <output root>/identities/<name>/adapter-<sha256[:16]>.safetensors

A name keeps its adapter until the identity is deleted.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echovideo.errors import RequestError, RunError, StorageError
from echovideo.request import RenderRequest, check_identity_name
from pipelines.storage import NotFoundError, StoragePath

if TYPE_CHECKING:
    # A manifest is checked without torch.
    from echovideo.training.adapters import Adapter

SCHEMA = 1
_CARD = "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityCard:
    """What must be known of a registered identity.

    `file` and `sha256` are its adapter's. `model` and `base_digest` name the model it was trained from, whose `licence`
    binds what is made with it; `consent_id` is the person's consent. `made` says what training it took.
    """

    name: str
    file: str
    sha256: str
    model: str
    base_digest: str
    licence: str
    consent_id: str
    made: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


class Identities:
    """The identities of an output root; cards are read once."""

    def __init__(self, output: StoragePath) -> None:
        self.folder = output / "identities"
        self.find = lru_cache(None)(self._find)

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return [name for name in self.folder.list_names() if (self.folder / name / _CARD).exists()]

    def cards(self) -> list[IdentityCard]:
        """Return all cards, by name."""
        return [self.find(name) for name in self.names()]

    def register(self, card: IdentityCard, adapter: Path) -> IdentityCard:
        """Store an adapter file under its card and return the card that stands.

        Raises StorageError `identity_exists` where the name has another adapter, and for what cannot be written.
        """
        place, file = self.folder / card.name / _CARD, self.folder / card.name / card.file
        if not place.exists():
            file.upload_file(adapter)
            if place.write_json_if_absent(asdict(card)):
                return card
        standing = self.find(card.name)
        if standing.sha256 != card.sha256:
            file.delete()
            raise exists_already(standing, self.folder)
        return standing

    def load(self, card: IdentityCard) -> Adapter:
        """Return a card's adapter.

        Raises StorageError `damaged` for other bytes than the card's, RunError `identity_changed` where the identity
        was deleted, or learnt anew, since the card was read, WeightsError.
        """
        from echovideo.training.adapters import Adapter

        place = self.folder / card.name / card.file
        with tempfile.TemporaryDirectory(prefix="echovideo-") as folder:
            local = Path(folder) / card.file
            try:
                place.download_file(local)
            except NotFoundError:
                raise RunError(
                    f"the identity {card.name!r} was deleted or learnt anew since it was asked for; ask again",
                    code="identity_changed",
                ) from None
            found = file_sha256(local)
            if found != card.sha256:
                raise StorageError(
                    f"{place} has SHA-256 {found}, its card says {card.sha256}; delete the identity and train it again",
                    code="damaged",
                )
            return Adapter.load(local)

    def check(self, request: RenderRequest, model_digest: str) -> IdentityCard | None:
        """Return the card of the identity that a request names, None if it names none.

        Raises RequestError unless the request may be rendered with it: `unknown_identity`, `identity_consent`,
        `identity_base`. `model_digest` "" stands for a model that is not known yet.
        """
        if request.identity_lora is None:
            return None
        card = self.find(request.identity_lora)
        if request.consent_id != card.consent_id:
            raise RequestError(
                f"identity_lora {card.name!r} may be used under the consent it was registered with only, and "
                f"consent_id is {request.consent_id!r}; give that consent's, or leave identity_lora out",
                code="identity_consent",
            )
        if model_digest and card.base_digest != model_digest:
            raise RequestError(
                f"identity_lora {card.name!r} was trained on {card.model} ({card.base_digest[:16]}), and the model "
                f"here is another ({model_digest[:16]}); render with that model, or train the identity on this one",
                code="identity_base",
            )
        return card

    def named(self, requests: Iterable[RenderRequest]) -> dict[str, IdentityCard]:
        """Return the cards that requests ask for, by name."""
        names = {request.identity_lora for request in requests if request.identity_lora is not None}
        return {name: self.find(name) for name in sorted(names)}

    def delete(self, name: str) -> None:
        """Delete an identity, its card last: stopped half-way, it can be called again. Raises `unknown_identity`."""
        (self.folder / name / self.find(name).file).delete()
        (self.folder / name).delete_tree()

    def _find(self, name: str) -> IdentityCard:
        """Return a name's card; raises RequestError `unknown_identity`, listing the names that exist."""
        check_identity_name(name)
        try:
            record = (self.folder / name / _CARD).read_json()
        except NotFoundError:
            # Where the output lies is not said: over HTTP, that is not a tenant's to know.
            there = ", ".join(self.names()) or "none"
            raise RequestError(
                f"no identity {name!r} is registered here; there are: {there}", code="unknown_identity"
            ) from None
        if record.get("schema") != SCHEMA:
            raise StorageError(
                f"{self.folder / name / _CARD} has schema {record.get('schema')!r}; this release reads {SCHEMA}"
            )
        return IdentityCard(**record)


def exists_already(card: IdentityCard, folder: StoragePath) -> StorageError:
    """Return the error for a name that another adapter has."""
    return StorageError(
        f"{folder / card.name} holds another adapter ({card.sha256[:16]}) already; choose another name, or delete that "
        f"one with: echovideo identities delete {folder.parent} {card.name}",
        code="identity_exists",
    )


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
