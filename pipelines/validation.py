"""Validation of a whole run before any model loads."""

from __future__ import annotations

from echovideo.errors import RunError
from echovideo.settings import AVAILABLE_TIERS
from pipelines.config import RunConfig
from pipelines.manifest import Manifest, read_manifest
from pipelines.storage import StoragePath


def validate(config: RunConfig) -> Manifest:
    """Read and check the manifest, before any model loads.

    Raises RunError `refused_rows` for a strict run with bad rows, or when the manifest is not the one of the config.
    """
    path = StoragePath.parse(config.manifest, config.storage)
    manifest = read_manifest(
        path, config.defaults, config.uri_policy, AVAILABLE_TIERS, require_consent=config.require_consent
    )
    if manifest.digest != config.manifest_digest:
        raise RunError(f"{path} has changed since the run was submitted; submit it again", code="manifest_changed")
    if config.strict and manifest.refusals:
        listed = "\n".join(f"  {refusal.message}" for refusal in manifest.refusals)
        raise RunError(
            f"{len(manifest.refusals)} rows of {path} are refused, and the run is strict:\n{listed}",
            code="refused_rows",
            numbers={"refused": len(manifest.refusals)},
        )
    return manifest
