"""The render request: what one video is asked to be, validated before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from echovideo.errors import RequestError

Tier = Literal["exact", "high", "fast"]
GuidanceSchedule = Literal["published", "constant", "cosine"]
FacePolicy = Literal["largest", "reject"]
"""What to do with a photo of several people: take the largest face, or refuse the photo."""

SIZES: Mapping[str, tuple[int, int]] = {
    "wide": (480, 848),
    "standard": (480, 640),
    "square": (480, 480),
    "portrait": (640, 480),
    "tall": (848, 480),
}
"""The five published sizes by name, as (height, width) in pixels."""

MAX_FRAMES = 49
MAX_SIDE = 2048
MAX_PROMPT_CHARACTERS = 4000
DEFAULT_FPS = 16
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 6.0
DEFAULT_SEED = 42

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_ROW_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IDENTITY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_size(size: str) -> tuple[int, int]:
    """Return (height, width) in pixels of a published name or a "WIDTHxHEIGHT" text; raises RequestError."""
    if size in SIZES:
        return SIZES[size]
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f"size {size!r} is neither WIDTHxHEIGHT nor one of {', '.join(SIZES)}", code="invalid_size")
    width, height = int(match[1]), int(match[2])
    check_size(height, width)
    return height, width


def check_size(height: int, width: int) -> None:
    """Raise RequestError unless height and width are multiples of 16, 16 to 2048 pixels."""
    for name, side in (("height", height), ("width", width)):
        if side < 16 or side > MAX_SIDE or side % 16:
            raise RequestError(
                f"{name} {side} is not a multiple of 16 from 16 to {MAX_SIDE}; the published sizes are "
                + ", ".join(f"{name} {w}x{h}" for name, (h, w) in SIZES.items()),
                code="invalid_size",
            )


def check_num_frames(num_frames: int) -> None:
    """Raise RequestError unless num_frames is 8k+1 from 9 to 49, the counts the VAE decodes to themselves."""
    if num_frames not in range(9, MAX_FRAMES + 1, 8):
        raise RequestError(
            f"num_frames {num_frames} is not 8k+1 up to {MAX_FRAMES}: allowed are "
            + ", ".join(str(n) for n in range(9, MAX_FRAMES + 1, 8)),
            code="invalid_num_frames",
        )


def check_sampling(num_inference_steps: int, guidance_scale: float, guidance_schedule: str) -> None:
    """Raise RequestError unless there are 1 to 1000 steps, a scale from 1 to 30, and a known schedule."""
    check_range("num_inference_steps", num_inference_steps, 1, 1000)
    check_range("guidance_scale", guidance_scale, 1.0, 30.0)
    check_choice("guidance_schedule", guidance_schedule, GuidanceSchedule)


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise RequestError unless the value is one of a Literal's."""
    if value not in get_args(choices):
        raise RequestError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}", code=f"invalid_{name}")


def frames_for_seconds(seconds: float, fps: int = DEFAULT_FPS) -> int:
    """Return the allowed frame count nearest to `seconds` at `fps`, 1 to 60; raises RequestError beyond 49 frames."""
    check_range("fps", fps, 1, 60)
    wanted = seconds * fps
    if not 0 < wanted <= MAX_FRAMES + 4:
        raise RequestError(
            f"{seconds:g} s at {fps} fps is {wanted:.0f} frames; allowed are 9 to {MAX_FRAMES} "
            f"({9 / fps:.2f} to {MAX_FRAMES / fps:.2f} s)",
            code="invalid_num_frames",
        )
    return min(range(9, MAX_FRAMES + 1, 8), key=lambda n: abs(n - wanted))


def check_text(name: str, text: str) -> None:
    """Raise RequestError for a text that was made of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is not valid UTF-8", code=f"invalid_{name}") from error


def check_identity_name(name: str) -> None:
    """Raise RequestError `invalid_identity_lora` unless an identity can be registered under this name."""
    if not _IDENTITY_NAME.fullmatch(name):
        raise RequestError(
            f"identity_lora {name!r} must be 1 to 64 letters, digits, '.', '_' or '-', and start with no mark",
            code="invalid_identity_lora",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderRequest:
    """One video to make: one manifest row, or one call of the HTTP service.

    Exactly one of `photo_uri` and `photo_bytes` is set. Sizes are pixels; `face_similarity` is the cosine
    similarity a video must reach (None: not gated) and `tries` how many seeds may be spent on reaching it.
    `identity_lora` names a registered identity whose adapter is put into the model.
    Raises RequestError, naming the value and what is allowed.
    """

    row_id: str
    prompt: str
    photo_uri: str | None = None
    photo_bytes: bytes | None = field(default=None, repr=False)
    negative_prompt: str = ""
    seed: int = DEFAULT_SEED
    height: int = 480
    width: int = 848
    num_frames: int = MAX_FRAMES
    fps: int = DEFAULT_FPS
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE
    guidance_schedule: GuidanceSchedule = "published"
    tier: Tier = "exact"
    consent_id: str | None = None
    identity_lora: str | None = None
    face_similarity: float | None = None
    tries: int = 1
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _ROW_ID.fullmatch(self.row_id):
            raise RequestError(
                f"row_id {self.row_id!r} must be 1 to 128 letters, digits, '.', '_' or '-', and start with no mark",
                code="invalid_row_id",
            )
        if (self.photo_uri is None) == (self.photo_bytes is None):
            raise RequestError("give exactly one of photo_uri and photo_bytes", code="invalid_photo")
        if not self.prompt.strip():
            raise RequestError("prompt is empty; say what the person does", code="invalid_prompt")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise RequestError(
                    f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS}", code="invalid_prompt"
                )
            check_text(name, text)
        check_size(self.height, self.width)
        check_num_frames(self.num_frames)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("fps", self.fps, 1, 60)
        check_sampling(self.num_inference_steps, self.guidance_scale, self.guidance_schedule)
        check_range("tries", self.tries, 1, 16)
        if self.identity_lora is not None:
            check_identity_name(self.identity_lora)
        if self.face_similarity is not None:
            check_range("face_similarity", self.face_similarity, -1.0, 1.0)
        check_choice("tier", self.tier, Tier)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(height, width, num_frames): requests of one bucket share one compiled shape."""
        return self.height, self.width, self.num_frames


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise RequestError unless the value is from `low` to `high`, both included."""
    if not low <= value <= high:
        raise RequestError(f"{name} {value} is outside {low:g} to {high:g}", code=f"invalid_{name}")
