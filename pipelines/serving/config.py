"""The service's configuration, and the runs it works on: one run of single requests a tenant, and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from echovideo.errors import RequestError, RunError, StorageError
from echovideo.model.card import ModelCard, folder_digest, read_card
from echovideo.model.config import TransformerConfig, read_config
from echovideo.request import FacePolicy
from echovideo.settings import EngineSettings
from pipelines.config import RunConfig
from pipelines.manifest import Defaults
from pipelines.photo_reader import UriPolicy, check_uri
from pipelines.storage import StorageOptions, StoragePath

ON_DEMAND = "on-demand"
"""Run id of a tenant's single requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDemandRun(RunConfig):
    """The run of a tenant's single requests, which never ends: its id is the same under every model."""

    @property
    def run_id(self) -> str:
        return ON_DEMAND


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """What the service is to do, as one value that travels as JSON.

    `store` is the folder or s3:// prefix that holds everything (layout: pipelines/serving/records.py), `model` a model
    folder on every machine of the cluster. `max_queued` single requests may wait; what is older than `retention_days`
    is deleted. Manifests and their photos may come from a tenant's own `inputs/` and from `batch_roots`: folders or
    s3:// prefixes, where "{tenant}" stands for the tenant's name.
    """

    store: str
    model: str
    model_digest: str
    card: ModelCard
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    storage: StorageOptions = field(default_factory=StorageOptions)
    engine: EngineSettings = field(default_factory=EngineSettings)
    several_faces: FacePolicy = "largest"
    require_consent: bool = False
    num_renderers: int = 1
    max_queued: int = 10_000
    retention_days: float | None = None
    batch_roots: tuple[str, ...] = ()
    secure_cookies: bool = True

    @classmethod
    def of_model(cls, model: str, **values: Any) -> Self:
        """Return the config for a model folder, whose card, sizes and digest are read now; `values` as the fields say.

        `storage` and `engine` may be plain dicts, as a deployment's YAML has them. Raises RunError for other names,
        WeightsError for a folder without a transformer.
        """
        unknown = set(values) - set(cls.__slots__)
        if unknown:
            raise RunError(f"the service has no setting {', '.join(sorted(unknown))}", code="unknown_setting")
        nested = {"storage": StorageOptions, "engine": EngineSettings}
        for name, kind in nested.items():
            if isinstance(values.get(name), Mapping):
                values[name] = kind(**values[name])
        if "batch_roots" in values:
            values["batch_roots"] = tuple(values["batch_roots"])
        folder = Path(model)
        return cls(
            model=model,
            model_digest=folder_digest(folder),
            card=read_card(folder),
            transformer=TransformerConfig.from_dict(read_config(folder / "transformer")),
            **values,
        )

    @property
    def store_path(self) -> StoragePath:
        """The root of everything."""
        return StoragePath.parse(self.store, self.storage)

    def tenant_root(self, tenant: str) -> StoragePath:
        """The tenant's own namespace: an output root as the batch path has them."""
        return self.store_path / "tenants" / tenant

    def on_demand(self, tenant: str) -> OnDemandRun:
        """Return the run of the tenant's single requests; their photos are the tenant's uploads."""
        root = self.tenant_root(tenant)
        return OnDemandRun(
            manifest="",
            manifest_digest="",
            output=str(root),
            model=self.model,
            model_digest=self.model_digest,
            card=self.card,
            uri_policy=_policy([str(root / "runs" / ON_DEMAND / "uploads")]),
            storage=self.storage,
            engine=self.engine,
            several_faces=self.several_faces,
            require_consent=self.require_consent,
        )

    def batch(self, tenant: str, manifest: str, defaults: Defaults, *, require_consent: bool) -> RunConfig:
        """Return the run of a manifest of the tenant's; raises StorageError `uri_not_allowed`, `not_found`,
        and RequestError `invalid_manifest` for what is no address.
        """
        policy = _policy(self.input_roots(tenant))
        try:
            path = StoragePath.parse(manifest, self.storage)
        except StorageError as error:
            raise RequestError(error.message, code="invalid_manifest") from error
        check_uri(str(path), policy)
        return RunConfig(
            manifest=str(path),
            manifest_digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            output=str(self.tenant_root(tenant)),
            model=self.model,
            model_digest=self.model_digest,
            card=self.card,
            defaults=defaults.of_model(self.transformer),
            uri_policy=policy,
            storage=self.storage,
            engine=self.engine,
            several_faces=self.several_faces,
            require_consent=require_consent or self.require_consent,
            num_renderers=self.num_renderers,
        )

    def input_roots(self, tenant: str) -> list[str]:
        """Return the folders and prefixes that the tenant's manifests and photos may come from."""
        configured = [str(StoragePath.parse(root.replace("{tenant}", tenant))) for root in self.batch_roots]
        return [str(self.tenant_root(tenant) / "inputs"), *configured]


def _policy(roots: list[str]) -> UriPolicy:
    return UriPolicy(
        roots=tuple(root for root in roots if not root.startswith("s3://")),
        s3_buckets=tuple(root.removeprefix("s3://") for root in roots if root.startswith("s3://")),
    )
