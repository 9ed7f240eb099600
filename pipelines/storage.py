"""Storage: one path type for a local folder or an S3 prefix, with the few operations a run needs.

Every operation is finite (connect, read and retry limits) and raises StorageError, with the address and what to do.
Listings are never cached. Credentials are those of the standard AWS chain and are never held by a path.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from botocore.exceptions import BotoCoreError, NoCredentialsError
from s3fs import S3FileSystem

from echovideo.errors import StorageError

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
PARALLEL_READS = 16
_LISTING_PAGE = 1000
_LARGEST_PUT = 64 * 2**20


class NotFoundError(StorageError):
    """There is no such file or object."""

    code = "not_found"


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageOptions:
    """How to reach S3: `endpoint_url` of another S3 service than AWS (None: AWS, or what AWS's own settings say)."""

    endpoint_url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file of a listing: its path below the listed folder, its size, and when the store last wrote it.

    `modified_s` is seconds since 1970 by the store's own clock (S3: whole seconds).
    """

    path: str
    num_bytes: int
    modified_s: float


@dataclass(frozen=True)
class StoragePath(ABC):
    """An immutable address, "s3://bucket/key" or an absolute local path; made by `StoragePath.parse`.

    A path pickles as its address and options, and finds its process's shared client where it arrives.
    """

    address: str
    options: StorageOptions = field(default_factory=StorageOptions)

    @staticmethod
    def parse(text: str, options: StorageOptions | None = None) -> StoragePath:
        """Return the path of "s3://bucket/prefix", "file:///folder" or a local path; raises StorageError."""
        options = options or StorageOptions()
        if text.startswith("s3://"):
            if not text[len("s3://") :].split("/", 1)[0]:
                raise StorageError(f"{text!r} names no bucket; write s3://bucket/prefix")
            return _S3Path(text.rstrip("/"), options)
        if text.startswith("file://"):
            host, slash, path = text[len("file://") :].partition("/")
            if host not in ("", "localhost"):
                raise StorageError(f"{text!r} names the host {host!r}; write file:///folder or s3://bucket/prefix")
            text = unquote(slash + path)
        elif "://" in text:
            raise StorageError(f"{text!r} is neither a local path nor s3://bucket/prefix")
        if not text or "\0" in text:
            raise StorageError(f"{text!r} is no path")
        return _LocalPath(os.path.abspath(text), options)

    def __truediv__(self, part: str) -> StoragePath:
        """Return this path with `part` (one name, or several joined by "/") below it, joined with exactly one slash."""
        names = part.split("/")
        assert all(name not in ("", ".", "..") for name in names), f"not a plain relative path: {part!r}"
        return type(self)(f"{self.address.rstrip('/')}/{part}", self.options)

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def parent(self) -> StoragePath:
        """The folder or prefix that holds this path."""
        return type(self)(self.address.rsplit("/", 1)[0] or "/", self.options)

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Return the content; raises NotFoundError or StorageError."""

    @abstractmethod
    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, which lie within the content; raises as `read_bytes`."""

    @abstractmethod
    def write_bytes(self, data: bytes) -> None:
        """Write or replace the content at once: readers see all of the old or all of the new; raises StorageError."""

    @abstractmethod
    def write_if_absent(self, data: bytes) -> bool:
        """Write the content, durable and at once, only if nothing is there; True if it is now ours.

        When a reply was lost and the request repeated, S3 cannot say whose object is there; one that holds exactly
        `data` then counts as ours, so a record with one owner must carry something only that owner writes.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Return whether there is a file or object (not merely a folder or prefix) at this address."""

    @abstractmethod
    def stat(self) -> StoredFile:
        """Return size and time of the file or object; raises NotFoundError or StorageError."""

    @abstractmethod
    def list_names(self) -> list[str]:
        """Return the sorted names of the files and folders directly below; empty if there is no such folder."""

    @abstractmethod
    def list_files(self) -> list[StoredFile]:
        """Return every file below, at any depth, sorted by path; empty if there is no such folder."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file or object if it is there."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete every file below, and the folder itself."""

    @abstractmethod
    def upload_file(self, local: Path) -> None:
        """Write or replace the content with a local file's, at once."""

    @abstractmethod
    def download_file(self, local: Path) -> None:
        """Copy the content to a local file, which appears only when it is complete."""

    def read_json(self) -> Any:
        """Return the JSON value the file holds; raises StorageError if it is not JSON."""
        data = self.read_bytes()
        try:
            return json.loads(data)
        except ValueError as error:
            raise StorageError(f"{self} is not JSON ({error}); it is damaged, delete it", code="damaged") from error

    def read_many_json(self, names: Sequence[str]) -> list[Any]:
        """Return the JSON value of `self / name` for each name, in order, read in parallel; raises as `read_json`."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(lambda name: (self / name).read_json(), names))

    def write_json(self, value: Any) -> None:
        """Write or replace the file with `value` as JSON."""
        self.write_bytes(encode_json(value))

    def write_json_if_absent(self, value: Any) -> bool:
        """`write_if_absent` with `value` as JSON."""
        return self.write_if_absent(encode_json(value))


def encode_json(value: Any) -> bytes:
    """Return `value` as UTF-8 JSON with sorted keys and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()


class _LocalPath(StoragePath):
    def read_bytes(self) -> bytes:
        with self._errors():
            return Path(self.address).read_bytes()

    def read_range(self, start: int, stop: int) -> bytes:
        with self._errors(), Path(self.address).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write_bytes(self, data: bytes) -> None:
        with self._errors(), self._temporary() as temporary:
            _write_durably(temporary, data)
            os.replace(temporary, self.address)
            _sync_folder(temporary.parent)

    def write_if_absent(self, data: bytes) -> bool:
        with self._errors(), self._temporary() as temporary:
            _write_durably(temporary, data)
            try:
                os.link(temporary, self.address)
            except FileExistsError:
                return False
            _sync_folder(temporary.parent)
            return True

    def exists(self) -> bool:
        with self._errors():
            return os.path.isfile(self.address)

    def stat(self) -> StoredFile:
        with self._errors():
            status = os.stat(self.address)
            return StoredFile(path=self.name, num_bytes=status.st_size, modified_s=status.st_mtime)

    def list_names(self) -> list[str]:
        with self._errors():
            if not os.path.isdir(self.address):
                return []
            return sorted(name for name in os.listdir(self.address) if not _is_temporary(name))

    def list_files(self) -> list[StoredFile]:
        with self._errors():
            return sorted(_walk(self.address, ""), key=lambda file: file.path)

    def delete(self) -> None:
        with self._errors():
            Path(self.address).unlink(missing_ok=True)

    def delete_tree(self) -> None:
        with self._errors():
            if os.path.isdir(self.address):
                shutil.rmtree(self.address)

    def upload_file(self, local: Path) -> None:
        with self._errors(), self._temporary() as temporary:
            shutil.copyfile(local, temporary)
            _sync_file(temporary)
            os.replace(temporary, self.address)
            _sync_folder(temporary.parent)

    def download_file(self, local: Path) -> None:
        with self._errors(), _temporary_beside(local) as temporary:
            shutil.copyfile(self.address, temporary)
            os.replace(temporary, local)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        target = Path(self.address)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(target) as temporary:
            yield temporary

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFoundError(f"{self}: there is no such file") from error
        except PermissionError as error:
            raise StorageError(
                f"{self}: access refused; check the owner and mode of the file and its folders", code="access_denied"
            ) from error
        except OSError as error:
            raise StorageError(f"{self}: {error.strerror or error}") from error


class _S3Path(StoragePath):
    @property
    def _bucket(self) -> str:
        return self.address[len("s3://") :].split("/", 1)[0]

    @property
    def _key(self) -> str:
        return self.address[len("s3://") :].partition("/")[2]

    def read_bytes(self) -> bytes:
        with self._errors() as client:
            data: bytes = client.cat_file(f"{self._bucket}/{self._key}")
            return data

    def read_range(self, start: int, stop: int) -> bytes:
        with self._errors() as client:
            data: bytes = client.cat_file(f"{self._bucket}/{self._key}", start=start, end=stop)
            return data

    def write_bytes(self, data: bytes) -> None:
        with self._errors() as client:
            client.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=data)

    def write_if_absent(self, data: bytes) -> bool:
        with self._errors() as client:
            while True:
                try:
                    client.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=data, IfNoneMatch="*")
                    return True
                except OSError as error:
                    code = _s3_code(error)
                    if code == "PreconditionFailed":
                        return self.read_bytes() == data
                    # A conflict means that another write to this key is under way: nobody has won yet.
                    if code != "ConditionalRequestConflict":
                        raise

    def exists(self) -> bool:
        try:
            self.stat()
        except NotFoundError:
            return False
        return True

    def stat(self) -> StoredFile:
        with self._errors() as client:
            head = client.call_s3("head_object", Bucket=self._bucket, Key=self._key)
            return StoredFile(
                path=self.name, num_bytes=head["ContentLength"], modified_s=head["LastModified"].timestamp()
            )

    def list_names(self) -> list[str]:
        names = []
        for page in self._pages(Delimiter="/"):
            names += [entry["Key"].rsplit("/", 1)[-1] for entry in page.get("Contents", ())]
            names += [entry["Prefix"].rstrip("/").rsplit("/", 1)[-1] for entry in page.get("CommonPrefixes", ())]
        return sorted(filter(None, names))

    def list_files(self) -> list[StoredFile]:
        start = len(self._prefix)
        return sorted(
            (
                StoredFile(
                    path=entry["Key"][start:], num_bytes=entry["Size"], modified_s=entry["LastModified"].timestamp()
                )
                for page in self._pages()
                for entry in page.get("Contents", ())
                if not entry["Key"].endswith("/")
            ),
            key=lambda file: file.path,
        )

    def delete(self) -> None:
        with self._errors() as client:
            client.call_s3("delete_object", Bucket=self._bucket, Key=self._key)

    def delete_tree(self) -> None:
        keys = [self._prefix + file.path for file in self.list_files()]
        for start in range(0, len(keys), _LISTING_PAGE):
            objects = [{"Key": key} for key in keys[start : start + _LISTING_PAGE]]
            with self._errors() as client:
                answer = client.call_s3(
                    "delete_objects", Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
                )
            for failure in answer.get("Errors", ()):
                raise StorageError(f"s3://{self._bucket}/{failure['Key']} was not deleted: {failure['Message']}")

    def upload_file(self, local: Path) -> None:
        with self._errors() as client:
            client.put_file(str(local), f"{self._bucket}/{self._key}", chunksize=_LARGEST_PUT)

    def download_file(self, local: Path) -> None:
        with _temporary_beside(local) as temporary:
            with self._errors() as client:
                client.get_file(f"{self._bucket}/{self._key}", str(temporary))
            os.replace(temporary, local)

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _pages(self, **request: str) -> Iterator[dict[str, Any]]:
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            if "NextContinuationToken" in page:
                request["ContinuationToken"] = page["NextContinuationToken"]
            with self._errors() as client:
                page = client.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, **request)
            yield page

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        try:
            yield _s3_client(os.getpid(), self.options)
        except NoCredentialsError as error:
            raise StorageError(
                f"{self}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
                code="access_denied",
            ) from error
        except PermissionError as error:
            raise StorageError(
                f"{self}: credentials refused ({error}); check the key, its secret and the bucket's policy",
                code="access_denied",
            ) from error
        except FileNotFoundError as error:
            if _s3_code(error) == "NoSuchBucket":
                raise StorageError(
                    f"{self}: there is no bucket {self._bucket!r}; create it or correct the address",
                    code="no_such_bucket",
                ) from error
            raise NotFoundError(f"{self}: there is no such object") from error
        except (OSError, ValueError, BotoCoreError) as error:
            endpoint = self.options.endpoint_url or "AWS S3"
            raise StorageError(f"{self}: {error}; check that {endpoint} is up and reachable, then run again") from error


@lru_cache
def _s3_client(process: int, options: StorageOptions) -> Any:
    # `process` is part of the key because a forked child must not use its parent's connections and event loop.
    client = S3FileSystem(
        endpoint_url=options.endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "max_attempts": 4},
            "max_pool_connections": 2 * PARALLEL_READS,
        },
    )
    # Its own retries come on top of the client's above; they only need to cover a body cut off while it is read.
    client.retries = 2
    return client


def _s3_code(error: BaseException) -> str | None:
    response = getattr(error.__cause__, "response", None)
    return None if response is None else response["Error"].get("Code")


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    temporary = target.parent / f".{target.name[:64]}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    _sync(path, os.O_RDONLY)


def _sync_folder(path: Path) -> None:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str, below: str) -> Iterator[StoredFile]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        try:
            if entry.is_dir():
                yield from _walk(entry.path, f"{below}{entry.name}/")
            elif not _is_temporary(entry.name):
                status = entry.stat()
                yield StoredFile(path=below + entry.name, num_bytes=status.st_size, modified_s=status.st_mtime)
        except FileNotFoundError:
            # Deleted by another process since the folder was read.
            continue
