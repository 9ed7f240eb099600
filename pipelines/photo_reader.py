"""Photos and footage by address: local files, S3 objects and HTTPS, each only where the policy allows it."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urljoin, urlsplit

from echovideo.errors import StorageError
from pipelines.storage import StorageOptions, StoragePath

HTTPS_TIMEOUT_S = 30.0
MAX_REDIRECTS = 3
_CHUNK = 64 * 1024
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class UriPolicy:
    """Where photos may come from; what is not listed is refused, and nothing is listed by default.

    `roots`: local folders, with all below them once symbolic links are followed. `https_hosts`: "host", or
    "host:port" for another port than 443. `s3_buckets`: "bucket", or "bucket/prefix" for a part of one.
    """

    roots: tuple[str, ...] = ()
    https_hosts: tuple[str, ...] = ()
    s3_buckets: tuple[str, ...] = ()


def resolve_uri(uri: str, folder: StoragePath) -> str:
    """Return `uri` as an absolute address; a relative path is relative to `folder`, the manifest's."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    return f"{str(folder).rstrip('/')}/{uri}"


def check_uri(uri: str, policy: UriPolicy) -> None:
    """Raise StorageError `uri_not_allowed`, with the reason, unless the policy lets `uri` be read; reads nothing."""
    try:
        parts = urlsplit(uri if "://" in uri else "file:")
    except ValueError as error:
        _refuse(uri, str(error))
    if _CONTROL.search(uri):
        _refuse(uri, "it holds a control character")
    match parts.scheme:
        case "file":
            _allowed_file(uri, policy)
        case "s3":
            bucket, _, key = uri[len("s3://") :].partition("/")
            if not any(f"{bucket}/{key}".startswith(f"{allowed}/") for allowed in policy.s3_buckets):
                _refuse(uri, f"bucket {bucket!r} is not allowed here{_listed(policy.s3_buckets)}")
            if not key or any(part in (".", "..") for part in key.split("/")):
                _refuse(uri, "it names no plain object key")
        case "https":
            netloc = parts.netloc.lower()
            if netloc not in policy.https_hosts:
                _refuse(uri, f"host {netloc!r} is not allowed{_listed(policy.https_hosts)}")
            if not uri.isascii():
                _refuse(uri, "write what is not ASCII percent-encoded")
        case scheme:
            _refuse(uri, f"scheme {scheme!r} is not one of file, s3 and https")


def read_photo(uri: str, policy: UriPolicy, options: StorageOptions, max_bytes: int) -> bytes:
    """Return the photo's bytes from a local path, file://, s3:// or https:// address.

    Raises StorageError: `uri_not_allowed` before any read, `photo_too_large` beyond `max_bytes`, `not_found`,
    `photo_unreachable` and what storage raises.
    """
    check_uri(uri, policy)
    if uri.startswith("https://"):
        return fetch_https(uri, policy, max_bytes)
    path = locate(uri, policy, options)
    _check_size(uri, path.stat().num_bytes, max_bytes)
    return path.read_bytes()


def locate(uri: str, policy: UriPolicy, options: StorageOptions) -> StoragePath:
    """Return the path of a local or s3:// file that the policy allows.

    Raises StorageError `uri_not_allowed`, also for https, and `not_found` for a local file.
    """
    check_uri(uri, policy)
    if uri.startswith("https://"):
        _refuse(uri, "it is neither a local file nor s3://")
    if uri.startswith("s3://"):
        return StoragePath.parse(uri, options)
    local = _allowed_file(uri, policy)
    path = StoragePath.parse(str(local))
    path.stat()
    # A device or a pipe has no size to check and may never end.
    if not local.is_file():
        _refuse(uri, "it is not a regular file")
    return path


def fetch_https(
    uri: str,
    policy: UriPolicy,
    max_bytes: int,
    *,
    context: ssl.SSLContext | None = None,
    is_allowed_address: Callable[[str], bool] | None = None,
) -> bytes:
    """Return the body at an https address of an allowed host.

    Redirects are followed within the same host only, private addresses are refused, the whole transfer is cut at
    HTTPS_TIMEOUT_S and at `max_bytes`. `context` and `is_allowed_address` (an IP text; default: public ones) are for
    hosts inside a studio's own network. Raises StorageError.
    """
    context = context or ssl.create_default_context()
    is_allowed_address = is_allowed_address or _is_public
    deadline = time.monotonic() + HTTPS_TIMEOUT_S
    host = urlsplit(uri).netloc.lower()
    for _ in range(MAX_REDIRECTS + 1):
        check_uri(uri, policy)
        if urlsplit(uri).netloc.lower() != host:
            _refuse(uri, f"it is a redirect away from {host}")
        connection = _connect(uri, context, is_allowed_address)
        try:
            parts = urlsplit(uri)
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                uri = urljoin(uri, response.headers.get("Location", ""))
                continue
            if response.status != 200:
                raise StorageError(
                    f"photo {uri} answered {response.status} {response.reason}", code="photo_unreachable"
                )
            return _read_body(uri, response, max_bytes, deadline)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise StorageError(f"photo {uri} could not be read: {error}", code="photo_unreachable") from error
        finally:
            connection.close()
    raise StorageError(f"photo {uri} redirects more than {MAX_REDIRECTS} times", code="photo_unreachable")


def _read_body(uri: str, response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        _check_size(uri, len(body), max_bytes)
        if time.monotonic() > deadline:
            raise StorageError(f"photo {uri} took longer than {HTTPS_TIMEOUT_S:g} s", code="photo_unreachable")
    if response.length:
        raise StorageError(f"photo {uri} ended {response.length} bytes early", code="photo_unreachable")
    return bytes(body)


class _PinnedConnection(http.client.HTTPSConnection):
    """A connection to an address that was checked, so that a second look-up of the name cannot lead elsewhere."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=HTTPS_TIMEOUT_S, context=context)
        self._address = address
        self._tls = context

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def _connect(uri: str, context: ssl.SSLContext, is_allowed_address: Callable[[str], bool]) -> _PinnedConnection:
    parts = urlsplit(uri)
    host, port = parts.hostname or "", parts.port or 443
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StorageError(f"photo {uri}: host {host!r} has no address ({error})", code="photo_unreachable") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_allowed_address(address):
            _refuse(uri, f"host {host!r} is the private address {address}")
    return _PinnedConnection(host, port, addresses[0], context)


def _is_public(address: str) -> bool:
    return ipaddress.ip_address(address).is_global


def _allowed_file(uri: str, policy: UriPolicy) -> Path:
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            _refuse(uri, f"file:// with the host {parts.netloc!r}")
        uri_path = unquote(uri[len("file://") + len(parts.netloc) :])
    else:
        uri_path = uri
    if "\0" in uri_path or not os.path.isabs(uri_path):
        _refuse(uri, "it is no absolute path")
    path = os.path.realpath(uri_path)
    if not any(path.startswith(os.path.realpath(root).rstrip("/") + "/") for root in policy.roots):
        _refuse(uri, f"{path!r} is in no allowed folder{_listed(policy.roots)}")
    return Path(path)


def _listed(allowed: tuple[str, ...]) -> str:
    return f" (allowed: {', '.join(allowed) or 'none'})"


def _check_size(uri: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise StorageError(
            f"photo {uri} is larger than {max_bytes} bytes", code="photo_too_large", numbers={"max_bytes": max_bytes}
        )


def _refuse(uri: str, reason: str) -> NoReturn:
    raise StorageError(f"address {uri!r} is not allowed: {reason}", code="uri_not_allowed")
