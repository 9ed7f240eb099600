from __future__ import annotations

import datetime
import http.server
import ipaddress
import os
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from echovideo.errors import StorageError
from pipelines.photo_reader import UriPolicy, check_uri, fetch_https, read_photo, resolve_uri
from pipelines.storage import NotFoundError, StorageOptions, StoragePath

OPTIONS = StorageOptions()


def refusal(uri: str, policy: UriPolicy) -> str:
    with pytest.raises(StorageError) as caught:
        check_uri(uri, policy)
    assert caught.value.code == "uri_not_allowed"
    return caught.value.message


@pytest.fixture
def roots(tmp_path: Path) -> UriPolicy:
    """A policy for tmp_path/photos, which holds a.jpg; tmp_path/secret.jpg lies outside."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a b.jpg").write_bytes(b"photo")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return UriPolicy(roots=(str(tmp_path / "photos"),))


@pytest.mark.parametrize("uri", ["{0}/photos/a b.jpg", "file://{0}/photos/a%20b.jpg", "{0}/photos/x/../a b.jpg"])
def test_photo_below_a_root_is_read(uri: str, roots: UriPolicy, tmp_path: Path) -> None:
    assert read_photo(uri.format(tmp_path), roots, OPTIONS, 5) == b"photo"


@pytest.mark.parametrize(
    "uri",
    [
        "{0}/secret.jpg",
        "{0}/photos/../secret.jpg",
        "file://{0}/photos/%2e%2e/secret.jpg",
        "{0}/photos-of-others/a.jpg",
        "/etc/passwd",
        "/proc/self/environ",
        "a.jpg",
        "file://elsewhere{0}/photos/a.jpg",
        "{0}/photos/a\0.jpg",
        "file://{0}/photos/a%00.jpg",
    ],
)
def test_photo_outside_the_roots_is_refused(uri: str, roots: UriPolicy, tmp_path: Path) -> None:
    refusal(uri.format(tmp_path), roots)


def test_photo_behind_a_link_out_of_the_root_is_refused(roots: UriPolicy, tmp_path: Path) -> None:
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "photos" / "folder").symlink_to(tmp_path)
    assert "is in no allowed folder" in refusal(f"{tmp_path}/photos/link.jpg", roots)
    assert "is in no allowed folder" in refusal(f"{tmp_path}/photos/folder/secret.jpg", roots)
    # A ledger holds UTF-8, and a file's name any bytes.
    (tmp_path / "photos" / "bytes.jpg").symlink_to(tmp_path / "\udcff.jpg")
    assert refusal(f"{tmp_path}/photos/bytes.jpg", roots).encode()


def test_photo_too_large_missing_or_no_file_is_a_typed_error(roots: UriPolicy, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="larger than 4 bytes") as caught:
        read_photo(f"{tmp_path}/photos/a b.jpg", roots, OPTIONS, 4)
    assert caught.value.code == "photo_too_large"
    with pytest.raises(NotFoundError):
        read_photo(f"{tmp_path}/photos/none.jpg", roots, OPTIONS, 5)
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    with pytest.raises(StorageError, match="not a regular file"):
        read_photo(f"{tmp_path}/photos/pipe.jpg", roots, OPTIONS, 5)


def test_empty_policy_refuses_every_scheme() -> None:
    for uri in (
        "/a.jpg",
        "file:///a.jpg",
        "s3://b/a.jpg",
        "https://h/a.jpg",
        "http://h/a.jpg",
        "data:x://y",
        "ftp://h/a",
    ):
        refusal(uri, UriPolicy())
    assert "one of file, s3 and https" in refusal("http://h/a.jpg", UriPolicy(https_hosts=("h",)))


@pytest.mark.parametrize(
    "uri", ["https://user@h/a", "https://h:8443/a", "https://h.evil/a", "https://evil/h", "https:///a"]
)
def test_https_host_must_be_listed_as_it_is_written(uri: str) -> None:
    assert "is not allowed (allowed: h)" in refusal(uri, UriPolicy(https_hosts=("h",)))


@pytest.mark.parametrize(
    "uri", ["https://[::1/a.jpg", "https://h\u2100/a.jpg", "file://[/a.jpg", "https://h/\u00e9.jpg"]
)
def test_address_that_cannot_be_read_is_refused(uri: str) -> None:
    assert uri in refusal(uri, UriPolicy(roots=("/",), https_hosts=("h",)))


@pytest.mark.parametrize("uri", ["s3://other/a.jpg", "s3://b", "s3://b/", "s3://b/../other/a.jpg", "s3://b/a\r\nb"])
def test_s3_address_outside_the_buckets_is_refused(uri: str) -> None:
    refusal(uri, UriPolicy(s3_buckets=("b",)))


@pytest.mark.parametrize(
    "uri", ["s3://b/other/a.jpg", "s3://b/inputs.jpg", "s3://b/inputs/../other/a.jpg", "s3://bb/a"]
)
def test_s3_address_outside_the_allowed_prefix_is_refused(uri: str) -> None:
    policy = UriPolicy(s3_buckets=("b/inputs",))
    refusal(uri, policy)
    check_uri("s3://b/inputs/a.jpg", policy)


def test_s3_photo_is_read_up_to_its_limit(s3_root: StoragePath) -> None:
    (s3_root / "a.jpg").write_bytes(b"photo")
    policy = UriPolicy(s3_buckets=("echovideo",))
    assert read_photo(f"{s3_root}/a.jpg", policy, s3_root.options, 5) == b"photo"
    with pytest.raises(StorageError) as caught:
        read_photo(f"{s3_root}/a.jpg", policy, s3_root.options, 4)
    assert caught.value.code == "photo_too_large"


@pytest.mark.parametrize(
    ("uri", "folder", "resolved"),
    [
        ("photos/a.jpg", "/m", "/m/photos/a.jpg"),
        ("a.jpg", "s3://b/m", "s3://b/m/a.jpg"),
        ("/p/a.jpg", "s3://b/m", "/p/a.jpg"),
        ("https://h/a.jpg", "/m", "https://h/a.jpg"),
    ],
)
def test_relative_address_is_relative_to_the_folder(uri: str, folder: str, resolved: str) -> None:
    assert resolve_uri(uri, StoragePath.parse(folder)) == resolved


class _Photos(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/photo.jpg?v=1":
                self._answer(200, body=b"photo")
            case "/moved":
                self._answer(302, location="/photo.jpg?v=1")
            case "/away":
                self._answer(302, location="https://127.0.0.1:1/photo.jpg")
            case "/plain":
                self._answer(302, location="http://localhost/photo.jpg")
            case "/loop":
                self._answer(302, location="/loop")
            case "/malformed":
                self._answer(302, location="https://[::1/photo.jpg")
            case "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"x" * 65536)
                except OSError:
                    return
            case "/short":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"short")
            case _:
                self._answer(404)

    def _answer(self, status: int, *, location: str = "", body: bytes = b"") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def https_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ssl.SSLContext]]:
    """A real TLS server on localhost: its host:port, and a client context that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Photos) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}", ssl.create_default_context(cafile=str(pem))
        server.shutdown()


def fetch(server: tuple[str, ssl.SSLContext], path: str) -> bytes:
    host, context = server
    policy = UriPolicy(https_hosts=(host,))
    return fetch_https(
        f"https://{host}{path}", policy, 1_000_000, context=context, is_allowed_address=lambda address: True
    )


@pytest.mark.parametrize("path", ["/photo.jpg?v=1", "/moved"])
def test_https_photo_is_read_and_a_redirect_within_the_host_followed(
    path: str, https_server: tuple[str, ssl.SSLContext]
) -> None:
    assert fetch(https_server, path) == b"photo"


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/away", "uri_not_allowed", "host '127.0.0.1:1' is not allowed"),
        ("/plain", "uri_not_allowed", "scheme 'http'"),
        ("/malformed", "photo_unreachable", "Invalid IPv6 URL"),
        ("/loop", "photo_unreachable", "redirects more than"),
        ("/endless", "photo_too_large", "larger than 1000000 bytes"),
        ("/short", "photo_unreachable", "could not be read|bytes early"),
        ("/none", "photo_unreachable", "answered 404"),
    ],
)
def test_https_answer_that_is_no_photo_is_a_typed_error(
    path: str, code: str, words: str, https_server: tuple[str, ssl.SSLContext]
) -> None:
    with pytest.raises(StorageError, match=words) as caught:
        fetch(https_server, path)
    assert caught.value.code == code


def test_https_private_address_of_an_allowed_host_is_refused(https_server: tuple[str, ssl.SSLContext]) -> None:
    host, _ = https_server
    with pytest.raises(StorageError, match="is the private address") as caught:
        read_photo(f"https://{host}/photo.jpg?v=1", UriPolicy(https_hosts=(host,)), OPTIONS, 100)
    assert caught.value.code == "uri_not_allowed"


def test_https_certificate_that_is_not_trusted_is_refused(https_server: tuple[str, ssl.SSLContext]) -> None:
    host, _ = https_server
    with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch((host, ssl.create_default_context()), "/photo.jpg?v=1")
