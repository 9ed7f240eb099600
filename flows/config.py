"""One run from plain parameters, for the command line and the flow alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from echovideo.errors import RunError
from echovideo.model.card import ModelCard, folder_digest, read_card
from echovideo.model.config import TransformerConfig, read_config
from echovideo.request import FacePolicy
from echovideo.settings import Device, EngineSettings
from flows import DEFAULT_MODELS
from flows.models import find_model
from pipelines.config import RunConfig
from pipelines.manifest import Defaults, Manifest
from pipelines.photo_reader import UriPolicy
from pipelines.storage import StorageOptions, StoragePath
from pipelines.validation import validate, with_identities

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSettings:
    """What a batch may be asked for beside manifest, output and model; a deployment carries it as JSON.

    `allowed_roots` are folders and s3://bucket/prefix that photos may come from beside the manifest's own folder
    or bucket, `allowed_hosts` the https hosts. `models` is where the tiny model is built. `jobs_address` is the
    http:// address of a Ray cluster's jobs server, None to run on this machine.
    """

    # Read by pydantic when Prefect checks a deployment's parameters: a misspelt setting is refused, not ignored.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    defaults: Defaults = field(default_factory=Defaults)
    device: DeviceChoice = "auto"
    num_renderers: int = 1
    strict: bool = False
    require_consent: bool = False
    several_faces: FacePolicy = "largest"
    allowed_roots: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    endpoint_url: str | None = None
    models: str = str(DEFAULT_MODELS)
    jobs_address: str | None = None


def plan_run(manifest: str, output: str, model: str, settings: BatchSettings) -> tuple[RunConfig, Manifest]:
    """Check the manifest, then find the model, and return the run's config with the checked manifest.

    `manifest` and `output` are local paths or s3:// addresses. Raises what `validate` raises, before the model is
    looked for; WeightsError; RunError `device_unknown`.
    """
    storage = StorageOptions(endpoint_url=settings.endpoint_url)
    path = StoragePath.parse(manifest, storage)
    device = _device(settings)
    draft = RunConfig(
        manifest=str(path),
        manifest_digest=sha256(path.read_bytes()).hexdigest(),
        output=str(StoragePath.parse(output, storage)),
        model="",
        model_digest="",
        card=ModelCard(),
        defaults=settings.defaults,
        uri_policy=policy_for(path, settings.allowed_roots, settings.allowed_hosts),
        storage=storage,
        engine=EngineSettings(device=device),
        several_faces=settings.several_faces,
        strict=settings.strict,
        require_consent=settings.require_consent,
        num_renderers=settings.num_renderers,
        # The driver of a cluster job runs inside the cluster, where Ray finds itself.
        ray_address="auto" if settings.jobs_address else "local",
    )
    validate(draft)
    folder = find_model(model, Path(settings.models))
    trained = TransformerConfig.from_dict(read_config(folder / "transformer"))
    return with_identities(
        replace(
            draft,
            model=str(folder),
            model_digest=folder_digest(folder),
            card=read_card(folder),
            defaults=settings.defaults.of_model(trained),
        )
    )


def choose_device(choice: DeviceChoice) -> Device:
    """Return the device a choice stands for on this machine."""
    if choice != "auto":
        return choice
    # Only "auto" needs torch to be asked, and loading it takes seconds.
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(settings: BatchSettings) -> Device:
    if settings.jobs_address and settings.device == "auto":
        raise RunError(
            "say which device the cluster renders on, cpu or cuda: this machine's GPU says nothing about it",
            code="device_unknown",
        )
    return choose_device(settings.device)


def policy_for(manifest: StoragePath, roots: Sequence[str], hosts: Sequence[str]) -> UriPolicy:
    """Return the policy that allows the manifest's own folder or bucket, and what was added to it."""
    own = str(manifest.parent)
    if own.startswith("s3://"):
        own = "/".join(own.split("/")[:3])
    allowed = [str(StoragePath.parse(root)) for root in (own, *roots)]
    return UriPolicy(
        roots=tuple(root for root in allowed if not root.startswith("s3://")),
        https_hosts=tuple(host.lower() for host in hosts),
        s3_buckets=tuple(root[len("s3://") :] for root in allowed if root.startswith("s3://")),
    )
