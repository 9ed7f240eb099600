"""What every operation uses: the dispatcher and the face check behind it, and who is calling."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from grpc import RpcError
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.serving.access import Access, Caller, Scope
from pipelines.serving.api.problems import ProblemError, retry_after
from pipelines.serving.config import ServiceConfig
from pipelines.serving.dispatcher import Found, Refused

COOKIE = "echovideo_session"
CSRF_HEADER = "X-CSRF-Token"
_ANSWER_S = 20.0
_REMEMBERED_S = 5.0
_MOST_REMEMBERED = 10_000
_LOOKED_UP_AGAIN = retry_after(_REMEMBERED_S)
"""Asked sooner, the answer about a key or session is the same."""

bearer = HTTPBearer(auto_error=False, description="An API key: ev_...")
cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="A browser's session; see POST /sign-in.")


class Service:
    """The rest of the service, as the ingress sees it."""

    def __init__(self, config: ServiceConfig, dispatcher: DeploymentHandle[Any], faces: DeploymentHandle[Any]) -> None:
        self.config = config
        self.access = Access(config.store_path)
        self._dispatcher = dispatcher
        self._faces = faces
        self._callers: dict[bytes, tuple[float, Caller | None]] = {}
        self._wanted: dict[tuple[str, str], asyncio.Future[Found | None]] = {}
        self._finding: asyncio.Task[None] | None = None

    async def ask(self, method: str, *args: Any, within_s: float = _ANSWER_S) -> Any:
        """Return the dispatcher's answer; raises ProblemError where it refuses, or does not answer."""
        return await _answer(getattr(self._dispatcher, method).remote(*args), within_s)

    async def find(self, tenant: str, video_id: str) -> Found | None:
        """Return a video, None if the tenant has none of that id; all that are wanted meanwhile share the next call."""
        found = self._wanted.setdefault((tenant, video_id), asyncio.get_running_loop().create_future())
        if self._finding is None or self._finding.done():
            # In no client's name: Serve would cancel it for all as soon as that one hangs up.
            self._finding = asyncio.create_task(self._find_wanted(), context=contextvars.Context())
        return await asyncio.shield(found)

    async def _find_wanted(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                answers = await self.ask("find", list(wanted))
            except Exception as error:
                # Each caller is told, and answers for itself.
                for future in wanted.values():
                    future.set_exception(error)
            else:
                for future, answer in zip(wanted.values(), answers, strict=True):
                    future.set_result(answer)

    async def check_face(self, photo: bytes) -> dict[str, Any]:
        """Return the identity document of a cleaned photo."""
        document: dict[str, Any] = await _answer(self._faces.check.remote(photo), 60.0)
        return document

    async def caller(self, key_text: str | None, session: str | None) -> Caller | None:
        """Return who calls with a key's text, or with a session's cookie; remembered for five seconds."""
        secret = f"key {key_text}" if key_text is not None else f"session {session}"
        name, now = hashlib.sha256(secret.encode()).digest(), time.monotonic()
        seen_at, caller = self._callers.get(name, (-_REMEMBERED_S, None))
        if now - seen_at >= _REMEMBERED_S:
            caller = await asyncio.to_thread(self._find_caller, key_text, session)
            if len(self._callers) >= _MOST_REMEMBERED:
                self._callers.clear()
            self._callers[name] = (now, caller)
        return caller

    def forget_session(self, session: str) -> None:
        """End a session, here at once."""
        self._callers.clear()
        self.access.sign_out(session)

    def _find_caller(self, key_text: str | None, session: str | None) -> Caller | None:
        if key_text is not None:
            key = self.access.key_of_text(key_text)
            return None if key is None else Caller(key=key)
        return self.access.caller_of_session(session) if session else None


async def service_of(request: Request) -> Service:
    """Return the service that the application was made with."""
    service: Service = request.app.state.service
    return service


def needs(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    """Return the dependency that lets in callers with a scope, before any body is read."""

    async def let_in(
        request: Request,
        service: Annotated[Service, Depends(service_of)],
        key: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
        session: Annotated[str | None, Security(cookie)],
    ) -> Caller:
        if key is None and session is None:
            raise _unauthenticated("give an API key as a bearer token, or sign in")
        caller = await service.caller(None if key is None else key.credentials, session)
        if caller is None:
            raise _unauthenticated("the API key or the session is not, or no longer, valid")
        if scope not in caller.key.scopes:
            raise ProblemError(403, "forbidden", f"this needs a key with the scope {scope!r}", headers=_LOOKED_UP_AGAIN)
        if caller.session is not None and request.method != "GET":
            _check_same_site(request, caller.session.csrf_token)
        return caller

    return let_in


ServiceHere = Annotated[Service, Depends(service_of)]
Reader = Annotated[Caller, Depends(needs("read"))]
Maker = Annotated[Caller, Depends(needs("render"))]
Admin = Annotated[Caller, Depends(needs("admin"))]


def _check_same_site(request: Request, csrf_token: str) -> None:
    sent = request.headers.get(CSRF_HEADER, "")
    if not hmac.compare_digest(sent.encode(), csrf_token.encode()):
        raise ProblemError(
            403,
            "csrf",
            f"a browser's request needs {CSRF_HEADER} with the csrf_token of GET /v1/session",
            headers=_LOOKED_UP_AGAIN,
        )


def _unauthenticated(message: str) -> ProblemError:
    return ProblemError(401, "unauthenticated", message, headers={"WWW-Authenticate": "Bearer", **_LOOKED_UP_AGAIN})


async def _answer(response: Awaitable[Any], within_s: float) -> Any:
    try:
        async with asyncio.timeout(within_s):
            answer = await response
    except BackPressureError as error:
        raise ProblemError(429, "too_busy", "too many requests at once; try again", headers=retry_after(1)) from error
    except (RayError, RayServeException, RpcError, TimeoutError) as error:
        # A part of the service is being started again; what was accepted is in the records.
        raise ProblemError(
            503, "unavailable", "a part of the service does not answer; try again", headers=retry_after(5)
        ) from error
    if isinstance(answer, Refused):
        headers = {} if answer.retry_after_s is None else retry_after(answer.retry_after_s)
        raise ProblemError(answer.status, answer.code, answer.message, headers=headers)
    return answer
