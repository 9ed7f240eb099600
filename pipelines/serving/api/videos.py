"""/v1/videos: single requests, in the shape that the OpenAI client speaks."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from echovideo.errors import RequestError
from echovideo.model.config import TransformerConfig
from echovideo.request import (
    DEFAULT_STEPS,
    RenderRequest,
    frames_for_seconds,
    parse_size,
)
from echovideo.settings import check_tier
from pipelines.outcome import Ok, Rejected, RowOutcome
from pipelines.serving.access import Caller
from pipelines.serving.api.bodies import read_asked, read_json, stored_file
from pipelines.serving.api.problems import ProblemError, not_found, responses
from pipelines.serving.api.schemas import (
    Estimate,
    IdentityCheck,
    PhotoCheck,
    Video,
    VideoCreate,
    VideoDeleted,
    VideoPage,
    VideoRemix,
    VideosDeleted,
)
from pipelines.serving.api.service import Admin, Maker, Reader, Service, ServiceHere, needs
from pipelines.serving.dispatcher import Found
from pipelines.serving.photos import clean_photo, data_url, photo_of_text
from pipelines.serving.records import TenantStore, VideoRecord, new_video_id
from pipelines.storage import StoragePath

EVENT_EVERY_S = 0.2
"""Events are not sent faster than this, however short the steps."""
_QUIET_S = 10.0

router = APIRouter(prefix="/v1", tags=["videos"])
VideoId = Annotated[str, Path(pattern=r"^video_[0-9a-f]{24}$", description="The video's id.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key and body give the same video; another body is refused with 422.",
    ),
]
Variant = Literal["video", "thumbnail", "photo", "face"]
_PICTURES = {"thumbnail": "posters", "photo": "photos", "face": "faces"}


def _bodies(*schemas: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI entry of a body that comes as JSON or as multipart."""
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name, schema in schemas}}}


def _form_of(kind: type[Any], *files: str) -> dict[str, Any]:
    """Return the multipart schema of a JSON body's: its plain fields, and the photo as a file."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: field for name, field in schema["properties"].items() if name not in (*files, "tags")}
    if "tags" in schema["properties"]:
        fields["tags"] = {"type": "string", "description": "A JSON object of texts."}
    fields |= {name: {"type": "string", "format": "binary"} for name in files}
    required = [name for name in schema.get("required", ()) if name not in files]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


_PHOTO_FILES = ("photo", "input_reference")
_CREATE_BODY = _bodies(
    ("multipart/form-data", _form_of(VideoCreate, *_PHOTO_FILES)),
    ("application/json", {"$ref": "#/components/schemas/VideoCreate"}),
)
_PHOTO_BODY = _bodies(
    ("multipart/form-data", {**_form_of(PhotoCheck, "photo"), "required": ["photo"]}),
    ("application/json", {"$ref": "#/components/schemas/PhotoCheck"}),
)
_REMIX_BODY = _bodies(("application/json", {"$ref": "#/components/schemas/VideoRemix"}))


@router.post(
    "/videos",
    status_code=202,
    response_model=Video,
    responses=responses(400, 409, 413, 415, 429),
    openapi_extra=_CREATE_BODY,
)
async def create_video(
    request: Request, service: ServiceHere, caller: Maker, idempotency_key: IdempotencyKey = None
) -> Any:
    """Accept a request for a video; its record is durable before the answer."""
    asked, upload = await read_asked(request, VideoCreate, files=_PHOTO_FILES)
    _check_model(service, asked.model)
    if upload is None:
        given = asked.photo or (asked.input_reference and asked.input_reference.image_url)
        if not given:
            raise RequestError("photo is missing; send the photo of the person", code="invalid_photo")
        if asked.input_reference is not None and not given.startswith("data:"):
            raise RequestError("image_url must be a data: address; nothing is fetched", code="invalid_photo")
        upload = photo_of_text(given)
    wanted = _render_request(asked, service.config.transformer)
    photo = await asyncio.to_thread(clean_photo, upload)
    return await _accept(service, caller, wanted, photo, hashlib.sha256(photo).hexdigest(), idempotency_key)


@router.get("/videos", response_model=VideoPage, responses=responses(404))
async def list_videos(
    service: ServiceHere,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Any:
    """List the tenant's videos by when they were asked for."""
    page = await service.ask("videos", caller.key.tenant, limit, after, order)
    if page is None:
        raise not_found(f"video {after}")
    videos, more = page
    return {
        "object": "list",
        "data": videos,
        "first_id": videos[0]["id"] if videos else None,
        "last_id": videos[-1]["id"] if videos else None,
        "has_more": more,
    }


@router.delete("/videos", response_model=VideosDeleted, responses=responses())
async def delete_old_videos(
    service: ServiceHere,
    caller: Admin,
    before: Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds since 1970.")],
) -> Any:
    """Delete the tenant's ended videos that were asked for before a time, with their photos and faces."""
    return {"object": "videos.deleted", "deleted": await service.ask("delete_older", caller.key.tenant, before)}


@router.get("/videos/{video_id}", response_model=Video, responses=responses(404))
async def retrieve_video(service: ServiceHere, caller: Reader, video_id: VideoId) -> Any:
    """Return how a video stands."""
    _, view, _ = await _find(service, caller, video_id)
    return view


@router.delete("/videos/{video_id}", response_model=VideoDeleted, responses=responses(404))
async def delete_video(service: ServiceHere, caller: Maker, video_id: VideoId) -> Any:
    """Delete a video with all that was kept for it; if it is being made, its work stops before the next step."""
    if not await service.ask("delete", caller.key.tenant, video_id):
        raise not_found(f"video {video_id}")
    return {"id": video_id, "object": "video.deleted", "deleted": True}


@router.post(
    "/videos/{video_id}/remix",
    status_code=202,
    response_model=Video,
    responses=responses(400, 404, 409, 413, 415, 429),
    openapi_extra=_REMIX_BODY,
)
async def remix_video(
    request: Request,
    service: ServiceHere,
    caller: Maker,
    video_id: VideoId,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Accept a request for the same person in another scene."""
    asked = await read_json(request, VideoRemix)
    record, _, _ = await _find(service, caller, video_id)
    seed = record.request.seed if asked.seed is None else asked.seed
    wanted = replace(record.request, prompt=asked.prompt, seed=seed)
    return await _accept(
        service, caller, wanted, None, record.photo_sha256, idempotency_key, remixed_from=record.video_id
    )


@router.get(
    "/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {"video/mp4": {}, "image/jpeg": {}}},
        206: {"description": "The range asked for", "content": {"video/mp4": {}, "image/jpeg": {}}},
        304: {"description": "Not changed"},
        **responses(404, 409, 416),
    },
)
async def download_content(
    request: Request, service: ServiceHere, caller: Reader, video_id: VideoId, variant: Variant = "video"
) -> Response:
    """Return the MP4, a still of it, or the small pictures of the photo and of the face; ranges are answered."""
    record, view, outcome = await _find(service, caller, video_id)
    if variant == "video":
        return await stored_file(request, _video_path(service, outcome, view), "video/mp4", f"video of {video_id}")
    path = TenantStore(service.config, record.tenant).picture_path(_PICTURES[variant], video_id)
    return await stored_file(request, path, "image/jpeg", f"{variant} of {video_id} yet")


@router.get("/videos/{video_id}/record", responses=responses(404, 409))
async def retrieve_record(service: ServiceHere, caller: Reader, video_id: VideoId) -> dict[str, Any]:
    """Return how the video was made: settings, digests, seeds, timings and similarities, as its sidecar has it."""
    _, view, outcome = await _find(service, caller, video_id)
    _video_path(service, outcome, view)
    assert isinstance(outcome, Ok | Rejected)
    assert outcome.sidecar_uri is not None
    sidecar: dict[str, Any] = await asyncio.to_thread(
        StoragePath.parse(outcome.sidecar_uri, service.config.storage).read_json
    )
    return sidecar


async def _known_video(
    service: ServiceHere, caller: Annotated[Caller, Depends(needs("read"))], video_id: VideoId
) -> tuple[str, str]:
    await _find(service, caller, video_id)
    return caller.key.tenant, video_id


@router.get("/videos/{video_id}/events", response_class=EventSourceResponse, responses=responses(404))
async def watch_video(
    service: ServiceHere, video: Annotated[tuple[str, str], Depends(_known_video)]
) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens to a video as server-sent events, from how it stands now to its end.

    `video`: the video document, at every change. `preview`: `{"step", "jpeg"}`, a small picture between two steps as a
    data: address. `deleted`: `{"id"}`. The stream ends after `deleted` and after a `video` that is completed or failed;
    a client closes its side then. When the connection breaks, a new one starts with how things stand.
    """
    seen = seen_preview = 0
    shown: dict[str, Any] = {}
    while True:
        try:
            state = await service.ask("watch", *video, seen, seen_preview, _QUIET_S, within_s=2 * _QUIET_S)
        except ProblemError as error:
            if error.status != 503:
                raise
            await asyncio.sleep(1)
            continue
        if state is None:
            yield ServerSentEvent(event="deleted", data={"id": video[1]})
            return
        view = state["video"]
        if state["preview"] is not None:
            seen_preview = state["preview_version"]
            yield ServerSentEvent(event="preview", data={"step": view["step"], "jpeg": data_url(state["preview"])})
        seen = state["version"]
        # Its place in the queue changes without a change of its own.
        if view != shown:
            shown = view
            yield ServerSentEvent(event="video", id=str(seen), data=view)
        if view["status"] in ("completed", "failed"):
            return
        await asyncio.sleep(EVENT_EVERY_S)


@router.post(
    "/identities",
    response_model=IdentityCheck,
    responses=responses(400, 413, 415, 429),
    openapi_extra=_PHOTO_BODY,
    tags=["identities"],
)
async def check_identity(request: Request, service: ServiceHere, caller: Maker) -> Any:
    """Check a photo without rendering or keeping it: the face found, its quality, and the crop the model will use."""
    asked, upload = await read_asked(request, _OptionalPhoto, files=("photo",))
    if upload is None:
        if asked.photo is None:
            raise RequestError("photo is missing; send the photo of the person", code="invalid_photo")
        upload = photo_of_text(asked.photo)
    await service.ask("allow", caller.key)
    return await service.check_face(await asyncio.to_thread(clean_photo, upload))


class _OptionalPhoto(PhotoCheck):
    photo: str | None = None  # type: ignore[assignment]


@router.get("/estimate", response_model=Estimate, responses=responses())
async def estimate(
    service: ServiceHere,
    caller: Reader,
    size: str | None = None,
    num_frames: int | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
) -> Any:
    """Return how long a video of this shape would wait and take now."""
    height, width, num_frames = _shape(service.config.transformer, size, num_frames)
    wanted = RenderRequest(
        row_id="estimate",
        prompt="estimate",
        photo_uri="estimate",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
    )
    return await service.ask("estimate", wanted)


async def _find(service: Service, caller: Caller, video_id: str) -> Found:
    found = await service.find(caller.key.tenant, video_id)
    if found is None:
        raise not_found(f"video {video_id}")
    return found


async def _accept(
    service: Service,
    caller: Caller,
    wanted: RenderRequest,
    photo: bytes | None,
    photo_sha256: str,
    idempotency_key: str | None,
    *,
    remixed_from: str | None = None,
) -> Any:
    """Have a request let in, written and queued."""
    tenant = caller.key.tenant
    video_id = new_video_id(tenant, idempotency_key)
    record = VideoRecord(
        tenant=tenant,
        key_id=caller.key.key_id,
        created_at=time.time(),
        request=replace(wanted, row_id=video_id, photo_uri=f"uploads/{photo_sha256}.jpg"),
        photo_sha256=photo_sha256,
        nonce=secrets.token_hex(8),
        remixed_from=remixed_from,
    )
    return await service.ask("accept", record, caller.key, photo)


def _shape(trained: TransformerConfig, size: str | None, num_frames: int | None) -> tuple[int, int, int]:
    """Return height, width and frames; what is left out is as the model was trained."""
    height, width = parse_size(trained.default_size if size is None else size)
    return height, width, trained.sample_frames if num_frames is None else num_frames


def _render_request(asked: VideoCreate, trained: TransformerConfig) -> RenderRequest:
    """Return what a body asks for, its id and photo still to be given; raises RequestError."""
    if asked.num_frames is not None and asked.seconds is not None:
        raise RequestError("give num_frames or seconds, not both", code="invalid_num_frames")
    height, width, num_frames = _shape(trained, asked.size, asked.num_frames)
    check_tier(asked.tier)
    values = asked.model_dump(
        include={
            "prompt",
            "negative_prompt",
            "seed",
            "fps",
            "num_inference_steps",
            "guidance_scale",
            "guidance_schedule",
            "tier",
            "consent_id",
            "identity_lora",
            "face_similarity",
            "tries",
            "tags",
        }
    )
    wanted = RenderRequest(
        row_id="asked", photo_uri="asked", height=height, width=width, num_frames=num_frames, **values
    )
    if asked.seconds is None:
        return wanted
    return replace(wanted, num_frames=frames_for_seconds(asked.seconds, wanted.fps))


def _check_model(service: Service, model: str | None) -> None:
    served = service.config.card.name
    if model is not None and model != served:
        raise RequestError(f"model {model!r} is not served here; leave it out, or say {served!r}", code="unknown_model")


def _video_path(service: Service, outcome: RowOutcome | None, view: dict[str, Any]) -> StoragePath:
    video = outcome.video if isinstance(outcome, Ok | Rejected) else None
    if video is not None:
        return StoragePath.parse(video.uri, service.config.storage)
    if view["status"] == "failed":
        raise ProblemError(409, "no_video", f"the video failed: {view['error']['message']}")
    raise ProblemError(409, "not_ready", f"the video is {view['status'].replace('_', ' ')}; wait until it is completed")
