"""Who may do what: API keys, one-time sign-in links, and browser sessions, all stored as digests.

    access/keys/<key_id>.json        a key; deleting the file revokes the key and its sessions
    access/links/<sha256>.json       a sign-in link; <sha256>.used once somebody has followed it
    access/sessions/<sha256>.json    a browser's session, which has the rights of the key that made its link

Secrets are 256 random bits, so that one SHA-256 hides them as well as a slow hash would.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from echovideo.errors import RequestError
from pipelines.serving.records import check_tenant
from pipelines.storage import NotFoundError, StoragePath

Scope = Literal["read", "render", "admin"]
"""read: see one's tenant's videos. render: make, delete and check photos. admin: delete in bulk, and see metrics."""

_KEY_ID = re.compile(r"[0-9a-f]{12}")
LINK_S = 15 * 60.0
SESSION_S = 12 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a tenant. `sha256` is its secret's; times are seconds since 1970.

    It may ask for `requests_per_minute` renders, identity checks and batches, and have `max_active` videos queued or
    in progress.
    """

    key_id: str
    tenant: str
    scopes: tuple[Scope, ...]
    sha256: str
    created_at: float
    requests_per_minute: int = 60
    max_active: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A browser's session; `csrf_token` must come back in a header with whatever changes something."""

    key_id: str
    csrf_token: str
    expires_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls: a key, and the session it comes through if it is a browser."""

    key: Key
    session: Session | None = None


class Access:
    """The keys, links and sessions of a store."""

    def __init__(self, store: StoragePath) -> None:
        self.folder = store / "access"

    def create_key(
        self, tenant: str, scopes: Collection[str], *, requests_per_minute: int = 60, max_active: int = 100
    ) -> tuple[Key, str]:
        """Make a key and return it with its text, which nobody can find out again; raises RequestError."""
        for scope in scopes:
            if scope not in get_args(Scope):
                raise RequestError(f"scope {scope!r} is not one of {', '.join(get_args(Scope))}", code="invalid_scope")
        if min(requests_per_minute, max_active) < 1:
            raise RequestError("a key's limits must be at least 1", code="invalid_limit")
        secret = secrets.token_urlsafe(32)
        key = Key(
            key_id=secrets.token_hex(6),
            tenant=check_tenant(tenant),
            scopes=tuple(scope for scope in get_args(Scope) if scope in scopes),
            sha256=_digest(secret),
            created_at=time.time(),
            requests_per_minute=requests_per_minute,
            max_active=max_active,
        )
        (self.folder / "keys" / f"{key.key_id}.json").write_json(asdict(key))
        return key, f"ev_{key.key_id}_{secret}"

    def list_keys(self) -> list[Key]:
        """Return all keys, the oldest first."""
        folder = self.folder / "keys"
        return sorted((_key(record) for record in folder.read_many_json(folder.list_names())), key=_created_at)

    def revoke_key(self, key_id: str) -> None:
        """Delete a key; whoever uses it is refused within seconds. Raises RequestError `no_key`."""
        if self.find_key(key_id) is None:
            raise RequestError(f"there is no key {key_id}", code="no_key")
        (self.folder / "keys" / f"{key_id}.json").delete()

    def find_key(self, key_id: str) -> Key | None:
        """Return a key by its id, None if there is none."""
        if not _KEY_ID.fullmatch(key_id):
            return None
        try:
            return _key((self.folder / "keys" / f"{key_id}.json").read_json())
        except NotFoundError:
            return None

    def key_of_text(self, text: str) -> Key | None:
        """Return the key whose text this is, None for any other text."""
        parts = text.split("_", 2)
        if len(parts) != 3 or parts[0] != "ev":
            return None
        key = self.find_key(parts[1])
        return key if key is not None and hmac.compare_digest(key.sha256, _digest(parts[2])) else None

    def create_link(self, key_id: str) -> tuple[str, float]:
        """Return a sign-in link's token, good once for 15 minutes, and when it ends."""
        token, expires_at = secrets.token_urlsafe(32), time.time() + LINK_S
        (self.folder / "links" / f"{_digest(token)}.json").write_json({"key_id": key_id, "expires_at": expires_at})
        return token, expires_at

    def sign_in(self, token: str) -> tuple[str, Session] | None:
        """Use a link up and return a new session and its cookie's value; None for a used, old or unknown link."""
        digest = _digest(token)
        try:
            link = (self.folder / "links" / f"{digest}.json").read_json()
        except NotFoundError:
            return None
        if link["expires_at"] < time.time():
            return None
        # What is written tells two browsers with one link apart.
        if not (self.folder / "links" / f"{digest}.used").write_if_absent(secrets.token_bytes(8)):
            return None
        cookie = secrets.token_urlsafe(32)
        session = Session(
            key_id=link["key_id"], csrf_token=secrets.token_urlsafe(32), expires_at=time.time() + SESSION_S
        )
        (self.folder / "sessions" / f"{_digest(cookie)}.json").write_json(asdict(session))
        return cookie, session

    def caller_of_session(self, cookie: str) -> Caller | None:
        """Return who a cookie stands for, None if its session has ended or its key was revoked."""
        try:
            session = Session(**(self.folder / "sessions" / f"{_digest(cookie)}.json").read_json())
        except NotFoundError:
            return None
        key = self.find_key(session.key_id) if session.expires_at > time.time() else None
        return Caller(key=key, session=session) if key is not None else None

    def sign_out(self, cookie: str) -> None:
        """End a session."""
        (self.folder / "sessions" / f"{_digest(cookie)}.json").delete()

    def sweep(self, now: float) -> None:
        """Delete links and sessions that have ended."""
        for folder in (self.folder / "links", self.folder / "sessions"):
            for name in folder.list_names():
                # A browser may sign out in the meantime.
                with suppress(NotFoundError):
                    if name.endswith(".json") and (folder / name).read_json()["expires_at"] < now:
                        (folder / name.replace(".json", ".used")).delete()
                        (folder / name).delete()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(record: dict[str, Any]) -> Key:
    return Key(**{**record, "scopes": tuple(record["scopes"])})


def _created_at(key: Key) -> float:
    return key.created_at
