"""Browsers: a one-time link becomes a cookie that scripts cannot read, and a token against forged requests."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Form, Header, Query, Request, Security
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from pipelines.serving.access import SESSION_S
from pipelines.serving.api.page import sign_in_page
from pipelines.serving.api.problems import responses
from pipelines.serving.api.schemas import SessionView, SignInLink
from pipelines.serving.api.service import COOKIE, Reader, ServiceHere, cookie

router = APIRouter(tags=["sessions"])


@router.post("/v1/sign-in-links", status_code=201, response_model=SignInLink, responses=responses())
async def create_sign_in_link(service: ServiceHere, caller: Reader) -> Any:
    """Make a link that signs one browser in, once, within 15 minutes, with the rights of the caller's key."""
    token, expires_at = await asyncio.to_thread(service.access.create_link, caller.key.key_id)
    return {"path": f"/sign-in?token={token}", "expires_at": int(expires_at)}


@router.get("/sign-in", response_class=HTMLResponse, include_in_schema=False)
async def show_sign_in(token: Annotated[str, Query(max_length=200)]) -> HTMLResponse:
    """Ask for one press of a button: what looks at links in messages must not use them up.

    The press also makes the request that sets the cookie one of this site's own, so that the browser sends the Strict
    cookie along to the page that follows.
    """
    return sign_in_page(token)


@router.post("/sign-in", status_code=303, include_in_schema=False)
async def sign_in(
    service: ServiceHere,
    token: Annotated[str, Form(max_length=200)],
    sec_fetch_site: Annotated[str, Header()] = "same-origin",
) -> Response:
    """Use a link up, set the cookie and go to the page."""
    # Another site's form would sign people in as whoever made the link.
    own = sec_fetch_site == "same-origin"
    made = await asyncio.to_thread(service.access.sign_in, token) if own else None
    if made is None:
        return sign_in_page(None)
    value, _ = made
    response = RedirectResponse("./", 303)
    response.set_cookie(
        COOKIE,
        value,
        max_age=int(SESSION_S),
        httponly=True,
        samesite="strict",
        secure=service.config.secure_cookies,
    )
    return response


@router.get("/v1/session", response_model=SessionView, responses=responses())
async def retrieve_session(service: ServiceHere, caller: Reader) -> Any:
    """Return who is signed in, and the token that goes into X-CSRF-Token."""
    session = caller.session
    return {
        "tenant": caller.key.tenant,
        "scopes": list(caller.key.scopes),
        "csrf_token": session.csrf_token if session else None,
        "expires_at": int(session.expires_at) if session else None,
    }


@router.delete("/v1/session", status_code=204, responses=responses())
async def sign_out(
    request: Request,
    service: ServiceHere,
    caller: Reader,
    session: Annotated[str | None, Security(cookie)],
) -> Response:
    """Sign this browser out."""
    if caller.session is not None and session is not None:
        await asyncio.to_thread(service.forget_session, session)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=service.config.secure_cookies)
    return response
