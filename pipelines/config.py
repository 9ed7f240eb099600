"""A run's configuration: all that a driver needs to know, as one typed value that travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from echovideo.errors import RunError
from echovideo.model.card import ModelCard
from echovideo.request import FacePolicy
from echovideo.settings import EngineSettings
from pipelines.identities import IdentityCard
from pipelines.ledger import run_id_for
from pipelines.manifest import Defaults
from pipelines.photo_reader import UriPolicy
from pipelines.resources import StageResources
from pipelines.storage import StorageOptions, StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of one manifest into one output root.

    `manifest` and `output` are addresses (a local path or s3://), `model` a model folder's path on every machine of
    the cluster, `model_digest` its `folder_digest`, `card` its card, `num_renderers` how many engines work abreast.
    `identities` are the registered identities that the manifest's rows ask for.
    `ray_address` is "local" for a Ray of the driver's own, or what ray.init takes. `strict` refuses the whole batch
    for one bad row.
    """

    manifest: str
    manifest_digest: str
    output: str
    model: str
    model_digest: str
    card: ModelCard
    defaults: Defaults = field(default_factory=Defaults)
    uri_policy: UriPolicy = field(default_factory=UriPolicy)
    storage: StorageOptions = field(default_factory=StorageOptions)
    engine: EngineSettings = field(default_factory=EngineSettings)
    several_faces: FacePolicy = "largest"
    strict: bool = False
    require_consent: bool = False
    num_renderers: int = 1
    ray_address: str = "local"
    identities: Mapping[str, IdentityCard] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The digest of what decides the outcomes: the same manifest and settings are the same run, and resume it."""
        decides = {name: value for name, value in self.to_record().items() if name in _DECIDING}
        if self.identities:
            decides["identities"] = {name: card.sha256 for name, card in self.identities.items()}
        return run_id_for(self.manifest_digest, decides)

    @property
    def output_path(self) -> StoragePath:
        """The output root, an owner's namespace."""
        return StoragePath.parse(self.output, self.storage)

    def stages(self) -> dict[str, StageResources]:
        """Return each stage's reservation by name.

        On one GPU all three stages share it; CPU shares are small because torch's own threads do the work.
        """
        cuda = self.engine.device == "cuda"
        table = (
            StageResources(name="identity", actors=1, num_cpus=0.2, num_gpus=0.05 if cuda else 0),
            StageResources(name="condition", actors=1, num_cpus=0.2, num_gpus=0.1 if cuda else 0),
            StageResources(name="render", actors=self.num_renderers, num_cpus=0.4, num_gpus=0.85 if cuda else 0),
        )
        return {stage.name: stage for stage in table}

    def to_record(self) -> dict[str, Any]:
        """Return the config as a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the config of a `to_record` dict that may have been through JSON.

        Raises RunError `other_release` for a record with other fields.
        """
        nested = {
            "card": ModelCard,
            "defaults": Defaults,
            "uri_policy": UriPolicy,
            "storage": StorageOptions,
            "engine": EngineSettings,
        }
        cards = record.get("identities", {})
        try:
            values = {
                name: nested[name](**_tuples(value)) if name in nested else value for name, value in record.items()
            }
            values["identities"] = {name: IdentityCard(**card) for name, card in cards.items()}
            return cls(**values)
        except TypeError as error:
            raise RunError(
                f"the run was recorded by another release ({error}); use that one, or run its manifest anew",
                code="other_release",
            ) from error


_DECIDING = {
    "model_digest",
    "defaults",
    "uri_policy",
    "engine",
    "several_faces",
    "strict",
    "require_consent",
}


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into the tuples the records hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
