"""The documents of the HTTP interface; OpenAPI is made from them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from echovideo.request import (
    DEFAULT_FPS,
    DEFAULT_GUIDANCE,
    DEFAULT_SEED,
    DEFAULT_STEPS,
    MAX_FRAMES,
    MAX_PROMPT_CHARACTERS,
    SIZES,
    GuidanceSchedule,
    Tier,
)

_Tag = Annotated[str, Field(max_length=512)]
_NUMBER = re.compile(r"^[0-9]{1,9}(\.[0-9]{1,9})?$")
_SIZE_TEXT = f"WIDTHxHEIGHT in pixels, multiples of 16, or one of {', '.join(SIZES)}; by default as trained."


def _read_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


class _Asked(BaseModel):
    """A body whose misspelt fields are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class ImageReference(_Asked):
    """A photo as the OpenAI client's JSON form has it."""

    image_url: Annotated[str, Field(description="data:image/...;base64,...; other addresses are refused.")]


class VideoSettings(_Asked):
    """What one video is asked to be, but for its photo; the fields are the manifest's columns."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, pattern=r"\S")]
    model: Annotated[str | None, Field(description="The served model's name, if anything.")] = None
    size: Annotated[str | None, Field(description=_SIZE_TEXT)] = None
    seconds: Annotated[
        float | None,
        BeforeValidator(_read_number),
        Field(
            description="Length, rounded to an allowed number of frames; OpenAI's clients send it as text.",
            json_schema_extra={
                "anyOf": [{"type": "number"}, {"type": "string", "pattern": _NUMBER.pattern}, {"type": "null"}]
            },
        ),
    ] = None
    num_frames: Annotated[
        int | None,
        Field(description=f"9, 17, 25, 33, 41 or {MAX_FRAMES}, instead of seconds; by default as trained."),
    ] = None
    fps: int = DEFAULT_FPS
    seed: int = DEFAULT_SEED
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    guidance_schedule: GuidanceSchedule = "published"
    tier: Tier = "exact"
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] = ""
    consent_id: Annotated[str | None, Field(max_length=256, description="Your record of the person's consent.")] = None
    identity_lora: Annotated[
        str | None,
        Field(description="Name of a registered identity to render with; it asks for its own consent_id."),
    ] = None
    face_similarity: Annotated[
        float | None, Field(description="Render with further seeds until the video looks this much like the photo.")
    ] = None
    tries: Annotated[int, Field(description="Seeds that may be spent on that.")] = 1
    tags: Annotated[dict[_Tag, _Tag], Field(max_length=64, description="Passed through to the record.")] = {}


class VideoCreate(VideoSettings):
    """A request for a video, as JSON; multipart has the same fields, the photo as a file."""

    photo: Annotated[str | None, Field(description="The photo as base64 or a data: address.")] = None
    input_reference: Annotated[
        ImageReference | None, Field(description="The photo, as the OpenAI client calls it.")
    ] = None


class VideoRemix(_Asked):
    """A request for the same person in another scene; all settings but those given are the first video's."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, pattern=r"\S")]
    seed: int | None = None


class PhotoCheck(_Asked):
    """A photo to be checked, as JSON; multipart has a file `photo`."""

    photo: Annotated[str, Field(description="The photo as base64 or a data: address.")]


class BatchCreate(_Asked):
    """A request to render a manifest. The settings stand for columns that rows leave out."""

    manifest: Annotated[
        str, Field(min_length=1, description="Path or s3:// address; relative ones lie in the tenant's inputs/.")
    ]
    size: Annotated[str | None, Field(description=_SIZE_TEXT)] = None
    seconds: float | None = None
    num_frames: int | None = None
    fps: int = DEFAULT_FPS
    seed: int = DEFAULT_SEED
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    face_similarity: float | None = None
    tries: int = 1
    require_consent: bool = False


class VideoError(BaseModel):
    """Why a request gave no video; the codes are the batch path's."""

    code: str
    message: str
    numbers: Annotated[dict[str, float], Field(description="The measurements behind the message.")]


class Video(BaseModel):
    """A video as the OpenAI client knows it, and this service's further fields."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100, description="Percent of the denoising steps.")]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    completed_at: Annotated[int | None, Field(description="When it completed or failed.")]
    expires_at: Annotated[int | None, Field(description="When it will be deleted, if ever.")]
    error: VideoError | None
    prompt: str
    seconds: str
    size: Annotated[str, Field(description="WIDTHxHEIGHT")]
    remixed_from_video_id: str | None
    step: Annotated[int, Field(description="Denoising steps done.")]
    steps: int
    eta_seconds: Annotated[float | None, Field(description="Seconds until it is done; null while nothing is known.")]
    queue_position: Annotated[int | None, Field(description="Videos before this one; null once a renderer has it.")]
    num_frames: int
    fps: int
    seed: Annotated[int, Field(description="The seed asked for, or of the take that was kept.")]
    tier: Tier
    num_inference_steps: int
    guidance_scale: float
    guidance_schedule: GuidanceSchedule
    negative_prompt: str
    consent_id: str | None
    identity_lora: str | None
    face_similarity: float | None
    has_content: Annotated[bool, Field(description="Whether there is a video to download.")]


class VideoPage(BaseModel):
    """One page of a list."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A video is gone, and its work has stopped or will before its next step."""

    id: str
    object: Literal["video.deleted"]
    deleted: bool


class VideosDeleted(BaseModel):
    """How many videos are gone."""

    object: Literal["videos.deleted"]
    deleted: int


class Size(BaseModel):
    """Pixels."""

    width: int
    height: int


class Quality(BaseModel):
    """How good the photo's face is; see README."""

    detection_score: float
    face_px: float
    sharpness: float
    yaw_degrees: float


class IdentityCheck(BaseModel):
    """What the face step sees in a photo, or why it refuses it."""

    object: Literal["identity"]
    usable: bool
    refusal: VideoError | None
    photo: Size
    box: Annotated[list[float] | None, Field(description="Left, top, right, bottom in the upright photo's pixels.")]
    quality: Quality | None
    crop: Annotated[str | None, Field(description="The face as the model will see it, 512 px, as a data: address.")]
    face_nets: str


class Estimate(BaseModel):
    """How long a request would take now, from renders that ended lately; null while nothing is known."""

    queue_seconds: float | None
    render_seconds: float | None


class BatchCounts(BaseModel):
    """Rows by how they stand, as OpenAI's batches count them."""

    total: int
    completed: int
    failed: int


class BatchResults(BaseModel):
    """Where a batch's views are, null until they are written."""

    table: str | None
    report: str | None
    contact_sheet: str | None


class BatchError(BaseModel):
    """Why a batch as a whole could not be rendered."""

    code: str
    message: str


class Batch(BaseModel):
    """A manifest as the service renders it, or as the command line did into the same namespace."""

    id: str
    object: Literal["batch"]
    status: Literal["in_progress", "cancelling", "finalizing", "completed", "cancelled", "failed"]
    created_at: int
    manifest: Annotated[str, Field(description="The file's name.")]
    model: str
    request_counts: BatchCounts
    counts: Annotated[dict[str, int], Field(description="Rows by outcome: ok, rejected, failed, dead, cancelled.")]
    error: BatchError | None
    results: BatchResults


class BatchList(BaseModel):
    """All batches, the newest first."""

    object: Literal["list"]
    data: list[Batch]


class BatchDeleted(BaseModel):
    """A batch is gone, with every video that nothing else refers to."""

    id: str
    object: Literal["batch.deleted"]
    deleted: bool


class SignInLink(BaseModel):
    """A link that signs one browser in, once, with the rights of the key that made it."""

    path: str
    expires_at: int


class SessionView(BaseModel):
    """Who is signed in. `csrf_token` goes into X-CSRF-Token of whatever changes something."""

    tenant: str
    scopes: list[str]
    csrf_token: str | None
    expires_at: int | None


class ModelView(BaseModel):
    """What must be said of the model wherever its videos go."""

    name: str
    licence: str
    judged: bool
    notice: str


class Options(BaseModel):
    """What a request may ask of this service."""

    model: ModelView
    sizes: dict[str, Size]
    num_frames: list[int]
    tiers: list[Tier]
    guidance_schedules: list[GuidanceSchedule]
    defaults: dict[str, Any]
    require_consent: bool
    max_upload_bytes: int
    max_upload_pixels: int
    max_prompt_characters: int
    retention_days: float | None


class Health(BaseModel):
    """The dispatcher is at work."""

    status: Literal["ok"]


class Problem(BaseModel):
    """An error, as RFC 9457 has it, with the batch path's stable code."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    numbers: dict[str, float] = {}
