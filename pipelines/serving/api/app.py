"""The HTTP application; the ingress runs it. pipelines/serving/__init__.py says what a client must know."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echovideo.request import MAX_PROMPT_CHARACTERS, GuidanceSchedule
from echovideo.settings import AVAILABLE_TIERS
from pipelines.serving.api import batches, page, problems, sessions, videos
from pipelines.serving.api.bodies import BodyLimit
from pipelines.serving.api.problems import ProblemError, responses, retry_after
from pipelines.serving.api.schemas import (
    BatchCreate,
    Health,
    Options,
    PhotoCheck,
    Problem,
    VideoCreate,
    VideoRemix,
)
from pipelines.serving.api.service import Admin, Reader, Service, ServiceHere
from pipelines.serving.photos import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

router = APIRouter(tags=["service"])

_DEFAULT_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def create_api(service: Service) -> FastAPI:
    """Return the application over a service."""
    api = FastAPI(
        title="EchoVideo",
        version="1",
        description="Videos of one person, from a photo and a prompt: one at a time, or a manifest of thousands.",
        # FastAPI's documentation pages fetch scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    api.state.service = service
    problems.install(api)
    for each in (videos.router, batches.router, sessions.router, page.router, router):
        api.include_router(each)
    api.add_middleware(BodyLimit)
    api.add_middleware(DefaultHeaders)
    _add_schemas(api)
    return api


class DefaultHeaders:
    """ASGI middleware that sets the headers of a private, inert answer where an operation sets none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _DEFAULT_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)


@router.get("/healthz", response_model=Health, responses=responses())
async def health(service: ServiceHere) -> Any:
    """Return 200 once the service takes requests, 503 before."""
    if not await service.ask("health"):
        raise ProblemError(503, "starting", "the service is starting, or stands by", headers=retry_after(2))
    return {"status": "ok"}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}, **responses()},
)
async def metrics(service: ServiceHere, caller: Admin) -> Response:
    """Return queue wait, stage times, steps a second, memory and outcomes since the dispatcher's start."""
    return Response(await service.ask("measured"), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/options", response_model=Options, responses=responses())
async def options(service: ServiceHere, caller: Reader) -> Any:
    """Return what a request may ask of this service, for a form to be made of."""
    config = service.config
    trained = config.transformer
    defaults = {
        name: field.default
        for name, field in VideoCreate.model_fields.items()
        if isinstance(field.default, int | float | str)
    }
    return {
        "model": asdict(config.card),
        "sizes": {name: {"width": width, "height": height} for name, (height, width) in trained.sizes.items()},
        "num_frames": list(range(9, trained.sample_frames + 1, 8)),
        "tiers": list(AVAILABLE_TIERS),
        "guidance_schedules": list(get_args(GuidanceSchedule)),
        "defaults": {**defaults, "size": trained.default_size, "num_frames": trained.sample_frames},
        "require_consent": config.require_consent,
        "max_upload_bytes": MAX_UPLOAD_BYTES,
        "max_upload_pixels": MAX_UPLOAD_PIXELS,
        "max_prompt_characters": MAX_PROMPT_CHARACTERS,
        "retention_days": config.retention_days,
    }


def _add_schemas(api: FastAPI) -> None:
    """Put the schemas of bodies that operations read themselves, and of problems, into the OpenAPI document."""
    document = api.openapi()
    schemas = document["components"]["schemas"]
    for kind in (VideoCreate, VideoRemix, PhotoCheck, BatchCreate, Problem):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
