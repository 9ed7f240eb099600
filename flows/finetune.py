"""The flow that learns one person: data job, training, evaluation, registration under a name that rows can ask for.

Each step goes on where an earlier run of the flow stopped, so a flow that failed is simply run again.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefect import flow, task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from echovideo.errors import RequestError
from echovideo.request import check_identity_name
from echovideo.settings import EngineSettings
from echovideo.training.settings import one_person
from flows import DEFAULT_MODELS
from flows.config import DeviceChoice, choose_device, policy_for
from flows.models import find_model
from pipelines.identities import IdentityCard
from pipelines.storage import StorageOptions, StoragePath
from pipelines.training.data import DatasetSummary
from pipelines.training.finetune import REPORT, Finetune, FinetuneConfig
from pipelines.training.outcome import Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """What learning a person may be asked for; a deployment carries it as JSON.

    `work` is a local folder for data and training, by default `training/<name>` in a local output. `allowed_roots` are
    folders and s3://bucket/prefix that footage may come from beside the manifest's own folder or bucket. Every
    `validate_every` steps, by default a quarter of all, and at the end two videos are rendered and scored; the weights
    with the highest score are kept.
    """

    # Read by pydantic when Prefect checks a deployment's parameters: a misspelt setting is refused, not ignored.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    steps: int = 1000
    rank: int = 32
    batch_size: int = 1
    learning_rate: float = 1e-4
    recomputed_blocks: int = 0
    workers: int = 0
    validate_every: int | None = None
    trial_steps: int = 50
    device: DeviceChoice = "auto"
    work: str | None = None
    allowed_roots: tuple[str, ...] = ()
    endpoint_url: str | None = None
    models: str = str(DEFAULT_MODELS)


@flow(name="learn-person", flow_run_name="learn {name}", persist_result=False)
def finetune(
    manifest: str,
    output: str,
    name: str,
    consent_id: str,
    model: str = "tiny",
    settings: FinetuneSettings | None = None,
) -> dict[str, Any]:
    """Learn the person of a clip manifest, and return the identity's card, its scores and what became of the clips.

    Args:
        manifest: Path or s3:// address of the clip manifest; every row carries `consent_id`.
        output: Folder or s3:// prefix whose batches may ask for the identity.
        name: What rows ask for, as `identity_lora`.
        consent_id: The person's consent, which rows must name too.
        model: "tiny", a model folder, or a hub model fetched before.
        settings: Everything else; see FinetuneSettings.

    Raises EchoVideoErrors that say what to do.
    """
    job = Finetune(plan_finetune(manifest, output, name, consent_id, model, settings or FinetuneSettings()))
    # Standard output is the caller's, for one JSON document; progress goes where messages go.
    with redirect_stdout(sys.stderr):
        job.check()
        summary = _prepare(job)
        folder = _train(job)
        scores = _evaluate(job)
        card = _register(job, scores)
    report = folder / REPORT
    create_link_artifact(f"file://{report}", link_text=str(report), key=f"identity-{folder.name}")
    return {
        "identity": asdict(card),
        "scores": scores,
        "clips": dict(summary.counts),
        "left_out": {
            clip_id: outcome.message
            for clip_id, outcome in summary.outcomes.items()
            if not isinstance(outcome, Prepared)
        },
        "dataset_report": str(job.dataset / "report.html"),
        "report": str(report),
    }


def plan_finetune(
    manifest: str, output: str, name: str, consent_id: str, model: str, settings: FinetuneSettings
) -> FinetuneConfig:
    """Return the job of plain parameters; raises WeightsError, StorageError, RequestError, TrainingError."""
    check_identity_name(name)
    storage = StorageOptions(endpoint_url=settings.endpoint_url)
    root, path = StoragePath.parse(output, storage), StoragePath.parse(manifest, storage)
    stage = one_person(
        steps=settings.steps,
        batch_size=settings.batch_size,
        rank=settings.rank,
        learning_rate=settings.learning_rate,
        validate_every=settings.validate_every,
        recomputed_blocks=settings.recomputed_blocks,
    )
    if settings.work is None and "://" in str(root):
        raise RequestError(
            f"training needs a local folder to work in, and {root} is none; give one with --work", code="no_work_folder"
        )
    work = settings.work or str(root / "training" / name)
    return FinetuneConfig(
        manifest=str(path),
        output=str(root),
        work=Path(work).expanduser().absolute(),
        name=name,
        consent_id=consent_id,
        model=str(find_model(model, Path(settings.models))),
        settings=stage,
        uri_policy=policy_for(path, settings.allowed_roots, ()),
        storage=storage,
        engine=EngineSettings(device=choose_device(settings.device)),
        trial_steps=settings.trial_steps,
        workers=settings.workers,
    )


@task(name="prepare", cache_policy=NO_CACHE, persist_result=False)
def _prepare(job: Finetune) -> DatasetSummary:
    return job.prepare()


@task(name="train", cache_policy=NO_CACHE, persist_result=False)
def _train(job: Finetune) -> Path:
    return job.train()


@task(name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def _evaluate(job: Finetune) -> dict[str, Any]:
    return job.evaluate()


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
def _register(job: Finetune, scores: dict[str, Any]) -> IdentityCard:
    return job.register(scores)
