"""Errors as application/problem+json (RFC 9457), with the codes that outcomes and reports have."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from echovideo.errors import EchoVideoError, StorageError
from pipelines.serving.api.schemas import Problem

_log = logging.getLogger(__name__)


class ProblemError(EchoVideoError):
    """A request is answered with a status of its own; `headers` go with it."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = dict(headers or {})


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that says when to try again."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def not_found(what: str) -> ProblemError:
    """Return the answer for what is not there, or is somebody else's."""
    return ProblemError(404, "not_found", f"there is no {what}")


def problem_response(
    status: int,
    code: str,
    detail: str,
    *,
    numbers: Mapping[str, float] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return a problem document."""
    problem = Problem(
        type="about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        numbers=dict(numbers or {}),
    )
    return JSONResponse(
        problem.model_dump(), status, headers=dict(headers or {}), media_type="application/problem+json"
    )


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of an operation's problems, the ones any operation may meet included."""
    schema = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": schema}
        for status in sorted({400, 401, 403, 422, 503, *statuses})
    }


def install(api: FastAPI) -> None:
    """Answer every error with a problem document."""

    @api.exception_handler(ProblemError)
    async def refused(request: Request, error: ProblemError) -> JSONResponse:
        return problem_response(error.status, error.code, error.message, headers=error.headers)

    @api.exception_handler(StorageError)
    async def unreachable(request: Request, error: StorageError) -> JSONResponse:
        _log.error("the store failed: %s", error)
        return problem_response(503, error.code, "the store cannot be reached; try again", headers=retry_after(5))

    @api.exception_handler(EchoVideoError)
    async def unacceptable(request: Request, error: EchoVideoError) -> JSONResponse:
        return problem_response(422, error.code, error.message, numbers=error.numbers)

    @api.exception_handler(RequestValidationError)
    @api.exception_handler(ValidationError)
    async def invalid(request: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        return problem_response(422, "invalid_request", _listed(error))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return problem_response(error.status_code, code, str(error.detail), headers=error.headers)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem_response(500, "unexpected", "the service made an error; its log says which")


def _listed(error: RequestValidationError | ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()
    )
