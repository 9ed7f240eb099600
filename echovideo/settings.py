"""Engine settings, and what they and a request decide: available tiers, derived seeds, a video's key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from echovideo.errors import RequestError
from echovideo.request import RenderRequest, Tier, check_choice, check_range

NUMERICS_VERSION = 4
"""Raised with every change that moves a pixel at the exact tier, so that no older video is taken for a newer one."""

AVAILABLE_TIERS: tuple[Tier, ...] = ("exact",)
"""Tiers the engine gives; a request for another is refused, never silently rendered at this one."""

Device = Literal["cpu", "cuda"]

_DECIDING_FIELDS = (
    "prompt",
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_schedule",
    "tier",
    "face_similarity",
    "tries",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How a model is run, whatever it is asked for: bfloat16 on CUDA, float32 on CPU.

    `num_threads` pins torch's CPU threads while rendering: float32 sums differ in their last bits between one and
    two threads, so it is part of what decides the pixels. Raises RequestError for another device, or no thread.
    """

    device: Device = "cpu"
    num_threads: int = 2

    def __post_init__(self) -> None:
        check_choice("device", self.device, Device)
        check_range("num_threads", self.num_threads, 1, 1024)

    @property
    def numerics(self) -> dict[str, Any]:
        """All of the engine that decides pixels, for video keys and sidecars."""
        return {"version": NUMERICS_VERSION, **asdict(self)}


def check_tier(tier: Tier) -> None:
    """Raise RequestError `tier_unavailable` unless the engine gives the tier."""
    if tier not in AVAILABLE_TIERS:
        raise RequestError(
            f"tier {tier!r} is not available here; this engine gives {', '.join(AVAILABLE_TIERS)}",
            code="tier_unavailable",
        )


def derived_seeds(seed: int, tries: int) -> tuple[int, ...]:
    """Return the seeds of a row's tries: its own, then ones derived from it by sha256."""
    later = (
        int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") % 2**63
        for index in range(1, tries)
    )
    return (seed, *later)


def deciding_values(request: RenderRequest) -> dict[str, Any]:
    """Return the request's values that decide pixels; row id, tags and consent id do not."""
    return {name: getattr(request, name) for name in _DECIDING_FIELDS}


def video_key(
    request: RenderRequest,
    *,
    photo_sha256: str,
    face_nets: str,
    model_digest: str,
    settings: EngineSettings,
    adapter_sha256: str | None = None,
) -> str:
    """Return the sha256, as 64 hex digits, of everything that decides a video's pixels.

    Two rows that ask for the same pixels have the same key, and so share one video. `face_nets` is the pack's name,
    `adapter_sha256` the digest of the adapter that is put into the model.
    """
    decides = {
        "photo": photo_sha256,
        "face_nets": face_nets,
        "model": model_digest,
        "numerics": settings.numerics,
        "request": deciding_values(request),
        **({"adapter": adapter_sha256} if adapter_sha256 else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
