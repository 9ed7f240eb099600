"""Learning one person from footage, in four steps that each go on where an earlier call stopped.

    <work>/dataset/                 the data job's
    <work>/runs/<digest>/           one training: its checkpoints, metrics, adapter.safetensors, trial.json, report.html
    <output>/identities/<name>/     what a manifest row asks for by name

A run's name is the digest of all that decides its weights, so other settings or clips are another run.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from echovideo.engine import check_device, model_dtype
from echovideo.errors import DatasetError, RequestError
from echovideo.model.card import folder_digest, read_card
from echovideo.request import check_identity_name
from echovideo.settings import EngineSettings
from echovideo.training.adapters import Adapter
from echovideo.training.dataset import open_dataset
from echovideo.training.export import export_adapter
from echovideo.training.journal import read_metrics
from echovideo.training.settings import StageSettings
from echovideo.training.trial import (
    VALIDATION_PROMPTS,
    mean_score,
    prompt_states,
    trial_sheet,
    try_adapter,
    validation_scores,
)
from pipelines.identities import Identities, IdentityCard, exists_already, file_sha256
from pipelines.photo_reader import UriPolicy
from pipelines.storage import StorageOptions, StoragePath, encode_json
from pipelines.training.clips import read_clips
from pipelines.training.data import DataConfig, DatasetSummary, prepare_dataset
from pipelines.training.report import render_trial_report
from pipelines.training.train import TrainingRun, dataset_ingredients, run_training

ADAPTER, TRIAL, REPORT = "adapter.safetensors", "trial.json", "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One person to learn.

    `manifest` is a clip manifest's address, `output` the output root whose manifests may ask for `name`, `work` a local
    folder for what lies in between, `model` the base's folder. Every clip must carry `consent_id`. `trial_steps` are
    the denoising steps of the evaluation's videos; without `workers` training takes place in this process.
    """

    manifest: str
    output: str
    work: Path
    name: str
    consent_id: str
    model: str
    settings: StageSettings
    uri_policy: UriPolicy = field(default_factory=UriPolicy)
    storage: StorageOptions = field(default_factory=StorageOptions)
    engine: EngineSettings = field(default_factory=EngineSettings)
    trial_steps: int = 50
    workers: int = 0


class Finetune:
    """The four steps, in the order of their methods; `check` comes before them and costs nothing.

    All raise EchoVideoErrors that say what to do; the same call again goes on.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        assert config.settings.validate_every is not None, "validation says which weights are kept"
        self.config = config
        self.identities = Identities(StoragePath.parse(config.output, config.storage))
        self.dataset = config.work / "dataset"

    def check(self) -> None:
        """Refuse what could never be registered, before hours are spent on it.

        Raises RequestError `consent_missing`, `consent_mismatch`, `several_people`, `no_clips`; RunError `no_gpu`;
        ManifestError.
        """
        config = self.config
        check_identity_name(config.name)
        check_device(config.engine)
        if not config.consent_id.strip():
            raise RequestError("a consent id is needed: nobody is learnt without", code="consent_missing")
        manifest = read_clips(StoragePath.parse(config.manifest, config.storage), config.uri_policy)
        if not manifest.clips:
            reasons = "; ".join(refusal.message for refusal in manifest.refusals) or "it has no rows"
            raise RequestError(f"{config.manifest} has no clip that can be used: {reasons}", code="no_clips")
        others = sorted(clip.clip_id for clip in manifest.clips if clip.consent_id != config.consent_id)
        if others:
            raise RequestError(
                f"clips {', '.join(others)} have another consent_id than {config.consent_id!r}; an identity is "
                "registered under one consent, which all of its clips must carry",
                code="consent_mismatch",
            )
        people = sorted({clip.person_id for clip in manifest.clips})
        if len(people) > 1:
            raise RequestError(
                f"{config.manifest} shows {', '.join(people)}; an identity is one person's: train each from a manifest "
                "of their own",
                code="several_people",
            )

    def prepare(self) -> DatasetSummary:
        """Turn the footage into a dataset; raises what `prepare_dataset` does, DatasetError `one_clip`, `no_clips`.

        Clips that gave nothing are in the summary and in the dataset's report.
        """
        config = self.config
        summary = prepare_dataset(
            DataConfig(
                manifest=config.manifest,
                output=str(self.dataset),
                model=config.model,
                uri_policy=config.uri_policy,
                storage=config.storage,
                engine=config.engine,
            )
        )
        if not summary.counts["ok"]:
            raise DatasetError(
                f"no clip could be learnt from; {self.dataset / 'report.html'} says why of each", code="no_clips"
            )
        open_dataset(self.dataset).check_cross_clip()
        return summary

    def train(self) -> Path:
        """Train, or go on training, and return the run's folder with the adapter in it: of the best validation's step.

        Raises StorageError `identity_exists` before it trains, and what `run_training` raises.
        """
        config, folder = self.config, self.folder
        if config.name in self.identities.names():
            standing = self.identities.find(config.name)
            if standing.made.get("run") != folder.name:
                raise exists_already(standing, self.identities.folder)
        if (folder / ADAPTER).exists():
            # What an earlier call was stopped before.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return folder
        model = Path(config.model)
        result = run_training(
            TrainingRun(
                folder=folder,
                settings=config.settings,
                ingredients=partial(dataset_ingredients, model, self.dataset, config.settings),
                base_digest=self.base_digest,
                device=config.engine.device,
                num_workers=config.workers,
                validate=partial(
                    validation_scores,
                    model=model,
                    dataset=self.dataset,
                    texts=prompt_states(model, VALIDATION_PROMPTS, config.engine),
                    settings=config.engine,
                ),
            )
        )
        export_adapter(
            result.best,
            model,
            folder / ADAPTER,
            config.settings,
            base_digest=self.base_digest,
            consent_id=config.consent_id,
            dtype=model_dtype(config.engine),
        )
        shutil.rmtree(folder / "checkpoints")
        return folder

    def evaluate(self) -> dict[str, Any]:
        """Render with and without the adapter, write the report, and return the scores, those of the validation too."""
        config, folder = self.config, self.folder
        place = StoragePath.parse(str(folder / TRIAL))
        if place.exists():
            scores: dict[str, Any] = place.read_json()
            if scores["steps"] == config.trial_steps:
                return scores
        videos = try_adapter(
            Path(config.model),
            open_dataset(self.dataset),
            Adapter.load(folder / ADAPTER),
            self.base_digest,
            config.engine,
            steps=config.trial_steps,
        )
        validations = [line for line in read_metrics(folder) if "scores" in line]
        scores = {
            "without": asdict(mean_score(videos, adapted=False)),
            "with": asdict(mean_score(videos, adapted=True)),
            "videos": len(videos),
            "steps": config.trial_steps,
            "validations": validations,
            # As the checkpoint was chosen: the highest score, the later of equals.
            "trained_steps": max(validations, key=lambda line: (line["scores"]["score"], line["steps"]))["steps"],
        }
        sheet = io.BytesIO()
        trial_sheet(videos).save(sheet, "PNG")
        card = read_card(Path(config.model))
        facts = {
            "model": card.name,
            "licence": card.licence,
            "consent": config.consent_id,
            "training steps": f"{scores['trained_steps']} of {config.settings.steps}, the best by validation",
            "rank": config.settings.adapter.rank if config.settings.adapter else "",
        }
        page = render_trial_report(config.name, facts, videos, scores, sheet.getvalue(), card)
        StoragePath.parse(str(folder / REPORT)).write_bytes(page.encode())
        place.write_json(scores)
        return scores

    def register(self, scores: Mapping[str, Any]) -> IdentityCard:
        """Store the adapter under its name, with how it came about; raises StorageError `identity_exists`."""
        config, path = self.config, self.folder / ADAPTER
        sha256 = file_sha256(path)
        card = read_card(Path(config.model))
        return self.identities.register(
            IdentityCard(
                name=config.name,
                file=f"adapter-{sha256[:16]}.safetensors",
                sha256=sha256,
                model=card.name,
                base_digest=self.base_digest,
                licence=card.licence,
                consent_id=config.consent_id,
                made={
                    "run": self.folder.name,
                    "settings": config.settings.to_dict(),
                    "dataset": open_dataset(self.dataset).card.digest,
                    "scores": dict(scores),
                },
            ),
            path,
        )

    @cached_property
    def base_digest(self) -> str:
        """The base model's digest."""
        return folder_digest(Path(self.config.model))

    @property
    def folder(self) -> Path:
        """The run's folder; the dataset must be there."""
        dataset = open_dataset(self.dataset)
        decides = {
            "settings": self.config.settings.numbers(),
            "validate_every": self.config.settings.validate_every,
            "base": self.base_digest,
            "consent": self.config.consent_id,
            "dataset": dataset.card.digest,
            "examples": dict(dataset.card.files),
        }
        return self.config.work / "runs" / hashlib.sha256(encode_json(decides)).hexdigest()[:16]
