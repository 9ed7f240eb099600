"""What a video says of how it was made: in its own container, and in the sidecar beside it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from echovideo.model.card import ModelCard
from echovideo.request import RenderRequest
from echovideo.settings import EngineSettings, deciding_values

SIDECAR_VERSION = 1


def container_metadata(
    request: RenderRequest, card: ModelCard, *, seed: int, adapter_sha256: str | None = None
) -> dict[str, str]:
    """Return the MP4's metadata. It holds nothing that differs between two makings of the same pixels."""
    return {
        "title": request.prompt[:200],
        "generator": "EchoVideo",
        "model": card.name,
        "licence": card.licence,
        "tier": request.tier,
        "seed": str(seed),
        "ai_generated": "true",
        **({"adapter": adapter_sha256} if adapter_sha256 else {}),
        **({"comment": card.notice} if card.notice else {}),
    }


def sidecar_basis(
    request: RenderRequest, card: ModelCard, settings: EngineSettings, *, photo_sha256: str
) -> dict[str, Any]:
    """Return what every sidecar says: the request, the model and the engine, as a JSON-able dict."""
    return {
        "sidecar_version": SIDECAR_VERSION,
        "request": {**deciding_values(request), "consent_id": request.consent_id, "photo_sha256": photo_sha256},
        "model": asdict(card),
        "engine": settings.numerics,
    }
