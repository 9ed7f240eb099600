"""Bodies in and out: limited before they are read, photos from either form, and files by range."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echovideo.errors import RequestError
from pipelines.serving.api.problems import ProblemError, not_found, problem_response
from pipelines.serving.photos import MAX_UPLOAD_BYTES
from pipelines.storage import NotFoundError, StoragePath

MAX_BODY_BYTES = MAX_UPLOAD_BYTES * 4 // 3 + 2**20
"""The largest photo as base64, and a megabyte for the rest."""

_CHUNK = 2**20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_NESTED = re.compile(r"(tags|input_reference)\[([^\[\]]+)\]")
"""How the OpenAI client writes a field of a field in a form."""
_MAX_FIELD_BYTES = MAX_BODY_BYTES
"""A photo may come as the text of a data: address."""
Asked = TypeVar("Asked", bound=BaseModel)


class BodyLimit:
    """ASGI middleware that refuses larger bodies: by their announced length before any of it is read, else as read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise ProblemError(413, "body_too_large", _TOO_LARGE)
            return message

        await self.app(scope, counted, send)


_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes; send a smaller photo"


def _too_large() -> Response:
    return problem_response(413, "body_too_large", _TOO_LARGE, headers={"Connection": "close"})


async def read_asked(request: Request, kind: type[Asked], *, files: tuple[str, ...] = ()) -> tuple[Asked, bytes | None]:
    """Return the body, JSON or multipart, as `kind`, and the content of the one of `files` that multipart brought.

    Raises ProblemError 400 or 415, RequestError, pydantic's ValidationError.
    """
    form_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if form_type == "application/json":
        return kind.model_validate(await _json(request), strict=True), None
    if form_type not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ProblemError(
            415, "unsupported_media_type", "send application/json or multipart/form-data", headers={"Accept": "*/*"}
        )
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    content: bytes | None = None
    async with request.form(max_files=1, max_fields=64, max_part_size=_MAX_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in files:
                    raise RequestError(
                        f"{name!r} is no file here; files are {', '.join(files)}", code="invalid_request"
                    )
                content = await value.read()
            elif nested := _NESTED.fullmatch(name):
                inner.setdefault(nested[1], {})[nested[2]] = value
            else:
                values[name] = _tags(value) if name == "tags" else value
    return kind.model_validate(values | inner), content


async def read_json(request: Request, kind: type[Asked]) -> Asked:
    """Return a JSON body as `kind`; raises as `read_asked`."""
    asked, _ = await read_asked(request, kind)
    return asked


async def stored_file(request: Request, path: StoragePath, media_type: str, what: str) -> Response:
    """Return a stored file, or the one range of it that was asked for; 404 if it is not there.

    A file's name stands for its content here, or its time does, so that either is its entity tag.
    """
    try:
        file = await asyncio.to_thread(path.stat)
    except NotFoundError as error:
        raise not_found(what) from error
    tag = f'"{file.modified_s:.0f}-{file.num_bytes}"'
    headers = {"Accept-Ranges": "bytes", "ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, file.num_bytes, 200
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked and any(asked.groups()) and request.headers.get("if-range", tag) == tag:
        first, last = asked.groups()
        start = int(first) if first else max(0, file.num_bytes - int(last))
        stop = min(file.num_bytes, int(last) + 1) if first and last else file.num_bytes
        if start >= stop:
            return problem_response(
                416,
                "range_not_satisfiable",
                f"the file has {file.num_bytes} bytes",
                headers={"Content-Range": f"bytes */{file.num_bytes}"},
            )
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.num_bytes}"
    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(_chunks(path, start, stop), status, headers=headers, media_type=media_type)


async def _chunks(path: StoragePath, start: int, stop: int) -> AsyncIterator[bytes]:
    for at in range(start, stop, _CHUNK):
        yield await asyncio.to_thread(path.read_range, at, min(at + _CHUNK, stop))


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, "invalid_json", f"the body is not JSON: {error}") from error


def _tags(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"tags is not a JSON object: {error}", code="invalid_tags") from error
