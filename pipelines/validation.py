"""Validation of a whole run before any model loads."""

from __future__ import annotations

from dataclasses import replace

from echovideo.errors import RunError
from echovideo.settings import AVAILABLE_TIERS
from pipelines.config import RunConfig
from pipelines.identities import Identities
from pipelines.manifest import Manifest, read_manifest
from pipelines.storage import StoragePath


def validate(config: RunConfig) -> Manifest:
    """Read and check the manifest, before any model loads; a config without a model digest has no model yet.

    Raises RunError `refused_rows` for a strict run with bad rows, or when the manifest is not the one of the config.
    """
    path = StoragePath.parse(config.manifest, config.storage)
    identities = Identities(config.output_path)
    manifest = read_manifest(
        path,
        config.defaults,
        config.uri_policy,
        AVAILABLE_TIERS,
        require_consent=config.require_consent,
        check=lambda request: identities.check(request, config.model_digest),
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


def with_identities(config: RunConfig) -> tuple[RunConfig, Manifest]:
    """Return the config with the identities that its rows ask for, and the checked manifest; raises as `validate`."""
    manifest = validate(config)
    return replace(config, identities=Identities(config.output_path).named(manifest.requests)), manifest


def check_identities(config: RunConfig, manifest: Manifest) -> None:
    """Raise RunError `identity_changed` unless the rows' identities are those that the run was submitted with."""
    named = Identities(config.output_path).named(manifest.requests)
    for name in sorted(named.keys() | config.identities.keys()):
        if name not in named or name not in config.identities or named[name].sha256 != config.identities[name].sha256:
            raise RunError(
                f"the identity {name!r} has changed since the run was submitted; submit it again",
                code="identity_changed",
            )
