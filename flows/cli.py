"""The command line, `echovideo`: single videos, batches, learning a person, the service, photos, models, this machine.

Commands import what they need when they run: torch, Ray and Prefect take seconds to load, and --help needs none.

Exit status: 0 done; for `batch run`, every row ended Ok or Rejected. 1 an error, said in one line. 2 rows failed, died
or were cancelled (and, as everywhere, wrong usage). 130 ended by a second Ctrl-C.
"""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from echovideo.errors import EchoVideoError
from flows import DEFAULT_MODELS
from flows.console import COLOURS, LiveBatch, counts_text, err, facts_table, out, print_error, print_json, rows_table

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.ledger import Ledger
    from pipelines.outcome import RowOutcome
    from pipelines.serving.access import Access
    from pipelines.storage import StoragePath

_ROWS_FAILED = 2
_SHOWN_ROWS = 20


class _FriendlyGroup(TyperGroup):
    """Shows an EchoVideoError as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EchoVideoError as error:
            print_error(error.code, error.message, error.numbers, as_json=ctx.meta.get("json", False))
            raise typer.Exit(1) from error


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.meta["json"] = value
    return value


app = typer.Typer(
    cls=_FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Videos of one person, from a photo and a prompt: one at a time, or a manifest of thousands.",
)
identities_app = typer.Typer(no_args_is_help=True, help="The people that were learnt: list, delete.")
batch = typer.Typer(no_args_is_help=True, help="Render manifests: run, follow, report, cancel, delete.")
keys_app = typer.Typer(no_args_is_help=True, help="The service's API keys: create, list, revoke.")
models_app = typer.Typer(no_args_is_help=True, help="The models on this machine.")
app.add_typer(batch, name="batch")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(identities_app, name="identities")

Json = Annotated[
    bool,
    typer.Option("--json", callback=_remember_json, is_eager=True, help="Print one JSON document, for machines."),
]
Model = Annotated[str, typer.Option(help='"tiny", a model folder, or a hub model fetched before.')]
ModelsFolder = Annotated[
    Path, typer.Option("--models", envvar="ECHOVIDEO_MODELS", help="Folder in which the tiny model is built.")
]
EndpointUrl = Annotated[
    str | None, typer.Option(envvar="ECHOVIDEO_S3_ENDPOINT", help="S3 service that is not AWS's, http(s)://host:port.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to render; auto takes a GPU if there is one.")
]
Size = Annotated[
    str | None,
    typer.Option(help="WIDTHxHEIGHT, wide, standard, square, portrait or tall; by default as the model was trained."),
]
Frames = Annotated[
    int | None, typer.Option(help="Frames: 9, 17, 25, 33, 41 or 49; by default as the model was trained.")
]
Seconds = Annotated[float | None, typer.Option(help="Length instead of --frames.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance.")]
Fps = Annotated[int, typer.Option(help="Frames per second.")]
Photo = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="Photo of the person.")]
Output = Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix that holds runs and videos.")]
RunId = Annotated[str | None, typer.Argument(help="The run; the newest by default.")]
Store = Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix that holds all of the service.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def render(
    photo: Photo,
    prompt: Annotated[str, typer.Argument(help="What the person does.")],
    out_path: Annotated[
        Path, typer.Option("--out", dir_okay=False, help="The MP4; its sidecar is written beside it as .json.")
    ] = Path("video.mp4"),
    model: Model = "tiny",
    size: Size = None,
    frames: Frames = None,
    seconds: Seconds = None,
    steps: Steps = 50,
    seed: Seed = 42,
    guidance: Guidance = 6.0,
    fps: Fps = 16,
    device: Device = "auto",
    models: ModelsFolder = DEFAULT_MODELS,
    json: Json = False,
) -> None:
    """Render one video in this process, in the size and length that the model was trained on unless others are given.

    The published model makes 848x480 and 49 frames, the tiny one 96x96 and 17.
    """
    from echovideo.model.config import TransformerConfig, read_config
    from echovideo.request import RenderRequest, frames_for_seconds, parse_size
    from flows.models import find_model

    if frames is not None and seconds is not None:
        raise typer.BadParameter("give --frames or --seconds, not both")
    if out_path.suffix == ".json":
        raise typer.BadParameter(f"--out {out_path} is where the sidecar goes; name it .mp4")
    with err.status("loading"):
        folder = find_model(model, models)
    trained = TransformerConfig.from_dict(read_config(folder / "transformer"))
    height, width = parse_size(trained.default_size if size is None else size)
    num_frames = trained.sample_frames if frames is None else frames
    if seconds is not None:
        num_frames = frames_for_seconds(seconds, fps)
    request = RenderRequest(
        row_id="render",
        prompt=prompt,
        photo_bytes=photo.read_bytes(),
        seed=seed,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=err,
        disable=json,
    )
    with progress:
        task = progress.add_task("loading", total=steps)
        from echovideo.settings import EngineSettings
        from flows.config import choose_device
        from flows.single import render_one

        sidecar = render_one(
            request,
            folder,
            EngineSettings(device=choose_device(device)),
            out_path,
            lambda step: progress.update(task, completed=step, description="rendering"),
        )
    if json:
        print_json({**sidecar, "sidecar": str(out_path.with_suffix(".json").resolve())})
        return
    video = sidecar["video"]
    out.print(
        facts_table(
            {
                "video": out_path,
                "": f"{video['width']}x{video['height']}, {video['num_frames']} frames at {video['fps']} fps, "
                f"{video['num_bytes'] / 1000:.0f} kB",
                "sidecar": out_path.with_suffix(".json"),
                "model": f"{sidecar['model']['name']}, {sidecar['model']['licence']}",
            }
        )
    )
    if sidecar["model"]["notice"]:
        err.print(Text(sidecar["model"]["notice"], style="yellow"))


@app.command()
def identity(
    photo: Photo,
    out_path: Annotated[Path, typer.Option("--out", dir_okay=False, help="The picture, .png or .jpg.")] = Path(
        "identity.png"
    ),
    model: Model = "tiny",
    several_faces: Annotated[
        Literal["largest", "reject"], typer.Option(help="Take the largest of several faces, or refuse.")
    ] = "largest",
    models: ModelsFolder = DEFAULT_MODELS,
    json: Json = False,
) -> None:
    """Show what the face step sees in a photo, or why it refuses it."""
    from echovideo.faces.analyzer import FaceAnalyzer
    from echovideo.faces.packs import open_pack
    from echovideo.faces.photo import decode_photo
    from echovideo.faces.picture import draw_identity
    from flows.models import find_model

    if out_path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise typer.BadParameter(f"--out {out_path} is neither .png nor .jpg")
    content = photo.read_bytes()
    seen = FaceAnalyzer(open_pack(find_model(model, models) / "face_encoder")).analyze(content, policy=several_faces)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    draw_identity(decode_photo(content), seen).save(out_path)
    quality = asdict(seen.quality)
    if json:
        print_json(
            {
                "picture": str(out_path.resolve()),
                "box": seen.box,
                "quality": quality,
                "photo_sha256": seen.photo_sha256,
                "face_nets": seen.pack,
            }
        )
        return
    left, top, right, bottom = seen.box
    out.print(
        facts_table(
            {
                "picture": out_path,
                "face": f"{right - left:.0f} x {bottom - top:.0f} px at {left:.0f}, {top:.0f}",
                "detection": f"{quality['detection_score']:.3f}",
                "sharpness": f"{quality['sharpness']:.3f}",
                "yaw": f"{quality['yaw_degrees']:+.0f} degrees",
                "face nets": seen.pack,
            }
        )
    )


@app.command()
def train(
    manifest: Annotated[str, typer.Argument(help="Clip manifest, Parquet or CSV: a path or s3:// address.")],
    output: Output,
    name: Annotated[str, typer.Option(help="Name that identity_lora asks for.")],
    consent: Annotated[str, typer.Option(help="Your record of the person's consent; every clip must carry it.")],
    model: Model = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter's layers.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step, over all devices.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate; lower it if the loss is not finite.")] = 1e-4,
    recomputed_blocks: Annotated[
        int, typer.Option(min=0, help="Transformer blocks computed twice to save memory; more if it runs out.")
    ] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers, each with a GPU where there are; 0 trains in this process.")
    ] = 0,
    validate_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between validations, each of which renders 2 videos; the best one's weights are kept. "
            "A quarter of the steps by default.",
        ),
    ] = None,
    trial_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the videos that are compared.")] = 50,
    device: Device = "auto",
    work: Annotated[
        str | None, typer.Option(help="Local folder for data and training; OUTPUT/training/NAME by default.")
    ] = None,
    allow_root: Annotated[
        list[str] | None, typer.Option(help="Folder or s3://bucket/prefix for footage, beside the manifest's own.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    models: ModelsFolder = DEFAULT_MODELS,
    json: Json = False,
) -> None:
    """Learn one person from footage, compare videos with and without what was learnt, and register it under a name.

    The same command goes on where it stopped. Each clip's row names its consent_id, which must be --consent's.
    """
    _quieten()
    with err.status("loading"):
        from flows.finetune import FinetuneSettings, finetune

        settings = FinetuneSettings(
            steps=steps,
            rank=rank,
            batch_size=batch_size,
            learning_rate=learning_rate,
            recomputed_blocks=recomputed_blocks,
            workers=workers,
            validate_every=validate_every,
            trial_steps=trial_steps,
            device=device,
            work=work,
            allowed_roots=tuple(allow_root or ()),
            endpoint_url=endpoint_url,
            models=str(models),
        )
        _reach_prefect()
    try:
        result = finetune(manifest, output, name, consent, model, settings)
    except KeyboardInterrupt:
        err.print("Ended. What is prepared and the last checkpoint stay; the same command goes on.")
        raise
    if json:
        print_json(result)
        return
    card, scores = result["identity"], result["scores"]
    for clip_id, reason in result["left_out"].items():
        err.print(Text.assemble((f"{clip_id} was left out: ", "yellow"), reason))
    out.print(
        facts_table(
            {
                "identity": card["name"],
                "clips": f"{result['clips']['ok']} of {sum(result['clips'].values())}",
                "similarity": f"{scores['without']['similarity']:.3f} without, {scores['with']['similarity']:.3f} with",
                "faces found": f"{scores['without']['detection_rate']:.0%} without, "
                f"{scores['with']['detection_rate']:.0%} with",
                "report": result["report"],
                "adapter": f"{card['sha256'][:16]}, consent {card['consent_id']}",
                "model": f"{card['model']}, {card['licence']}",
            }
        )
    )


@identities_app.command("list")
def identities_list(output: Output, endpoint_url: EndpointUrl = None, json: Json = False) -> None:
    """Show the registered identities of an output."""
    from pipelines.identities import Identities
    from pipelines.storage import StorageOptions, StoragePath

    cards = Identities(StoragePath.parse(output, StorageOptions(endpoint_url=endpoint_url))).cards()
    if json:
        print_json({"identities": [asdict(card) for card in cards]})
    else:
        out.print(
            facts_table(
                {
                    card.name: f"{card.model}, {card.licence}, consent {card.consent_id}, {card.sha256[:16]}"
                    for card in cards
                }
            )
        )


@identities_app.command("delete")
def identities_delete(
    output: Output,
    name: Annotated[str, typer.Argument(help="The identity.")],
    yes: Yes = False,
    endpoint_url: EndpointUrl = None,
    json: Json = False,
) -> None:
    """Delete an identity, and what it was learnt from and in OUTPUT/training; its videos stay with their runs."""
    from echovideo.request import check_identity_name
    from pipelines.identities import Identities
    from pipelines.storage import StorageOptions, StoragePath

    root = StoragePath.parse(output, StorageOptions(endpoint_url=endpoint_url))
    if not yes:
        typer.confirm(f"Delete identity {name}, and its training in {root}?", abort=True, err=True)
    check_identity_name(name)
    identities, training = Identities(root), root / "training" / name
    # Of a training that was never finished there is footage, and no identity.
    if name in identities.names() or not training.list_names():
        identities.delete(name)
    training.delete_tree()
    if json:
        print_json({"name": name, "deleted": True})
    else:
        out.print(f"identity {name} is deleted")


@app.command()
def doctor(models: ModelsFolder = DEFAULT_MODELS, json: Json = False) -> None:
    """Check what this machine has; exits 1 if something it needs is missing."""
    from flows.doctor import checks

    with err.status("checking"):
        found = list(checks(models))
    missing = [check for check in found if check.status == "missing"]
    if json:
        print_json({"ok": not missing, "checks": [asdict(check) for check in found]})
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("check", "status", "found", "to do"):
            table.add_column(column, overflow="fold")
        words = {"absent": "not here"}
        for check in found:
            status = Text(words.get(check.status, check.status), COLOURS[check.status])
            table.add_row(check.name, status, check.found, check.advice)
        out.print(table, soft_wrap=False)
    raise typer.Exit(1 if missing else 0)


@app.command()
def serve(
    store: Store = "service",
    model: Model = "tiny",
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    renderers: Annotated[int, typer.Option(min=1, help="Engines side by side, each with a GPU of its own.")] = 1,
    max_queued: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 10_000,
    retention_days: Annotated[float | None, typer.Option(min=0, help="Delete videos and batches of this age.")] = None,
    require_consent: Annotated[bool, typer.Option(help="Refuse requests without a consent_id.")] = False,
    allow_root: Annotated[
        list[str] | None, typer.Option(help="Folder or s3://bucket/prefix that manifests and photos may come from.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    models: ModelsFolder = DEFAULT_MODELS,
) -> None:
    """Render on demand over HTTP, on this machine.

    Ctrl-C finishes what runs, a second one ends at once. What waits is in the store, and goes on at the next start.
    """
    _quieten()
    with err.status("loading"):
        from echovideo.settings import EngineSettings
        from flows.config import choose_device
        from flows.models import find_model
        from flows.serve import serve_here
        from pipelines.serving.config import ServiceConfig
        from pipelines.storage import StorageOptions, StoragePath

        config = ServiceConfig.of_model(
            str(find_model(model, models)),
            store=str(StoragePath.parse(store)),
            storage=StorageOptions(endpoint_url=endpoint_url),
            engine=EngineSettings(device=choose_device(device)),
            num_renderers=renderers,
            max_queued=max_queued,
            retention_days=retention_days,
            require_consent=require_consent,
            batch_roots=tuple(str(StoragePath.parse(root)) for root in allow_root or ()),
            # Browsers keep a Secure cookie only where there is https.
            secure_cookies=False,
        )
    serve_here(config, host, port, out, err)


@keys_app.command("create")
def keys_create(
    store: Store,
    tenant: Annotated[str, typer.Option(help="Whose key it is; a tenant sees its own videos only.")],
    scope: Annotated[list[str], typer.Option(help="read, render or admin; once for each.")],
    requests_per_minute: Annotated[int, typer.Option(help="Renders, photo checks and batches it may ask for.")] = 60,
    max_active: Annotated[int, typer.Option(help="Videos it may have queued or in progress.")] = 100,
    endpoint_url: EndpointUrl = None,
    json: Json = False,
) -> None:
    """Make an API key and print it, once: only its digest is kept."""
    key, text = _access(store, endpoint_url).create_key(
        tenant, scope, requests_per_minute=requests_per_minute, max_active=max_active
    )
    if json:
        print_json({"key_id": key.key_id, "tenant": key.tenant, "scopes": list(key.scopes), "key": text})
    else:
        out.print(facts_table({"key": text, "id": key.key_id, "tenant": key.tenant, "scopes": ", ".join(key.scopes)}))


@keys_app.command("list")
def keys_list(store: Store, endpoint_url: EndpointUrl = None, json: Json = False) -> None:
    """Show whose keys there are and what they may do."""
    keys = [
        {"key_id": key.key_id, "tenant": key.tenant, "scopes": list(key.scopes)}
        for key in _access(store, endpoint_url).list_keys()
    ]
    if json:
        print_json({"keys": keys})
    else:
        out.print(facts_table({str(key["key_id"]): f"{key['tenant']}: {', '.join(key['scopes'])}" for key in keys}))


@keys_app.command("revoke")
def keys_revoke(
    store: Store,
    key_id: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")],
    endpoint_url: EndpointUrl = None,
    json: Json = False,
) -> None:
    """End a key and every browser session that came from it, within seconds."""
    _access(store, endpoint_url).revoke_key(key_id)
    if json:
        print_json({"key_id": key_id, "revoked": True})
    else:
        out.print(f"key {key_id} is revoked")


@models_app.command("pull")
def models_pull(
    names: Annotated[
        list[str] | None, typer.Argument(help='"tiny", or hub models: owner/name or their address.')
    ] = None,
    yes: Yes = False,
    models: ModelsFolder = DEFAULT_MODELS,
    json: Json = False,
) -> None:
    """Build the tiny model, or fetch models from the Hugging Face Hub; says licence and size first."""
    from echovideo.errors import WeightsError
    from flows.models import LICENCE_NOTE, TINY_NAME, fetch, find_model, hub_name, hub_size

    folders: dict[str, str] = {}
    for name in names or [TINY_NAME]:
        if name == TINY_NAME:
            folders[name] = str(find_model(TINY_NAME, models))
            continue
        repository = hub_name(name)
        if repository is None:
            raise WeightsError(f"{name} is neither {TINY_NAME!r} nor a hub model, owner/name")
        num_bytes = hub_size(repository)
        err.print(f"{repository}: at most {num_bytes / 1e9:.1f} GB\n{LICENCE_NOTE}")
        if not yes:
            typer.confirm("Fetch it under these terms?", abort=True, err=True)
        folders[name] = str(fetch(repository, num_bytes))
    if json:
        print_json({"folders": folders})
    else:
        out.print(facts_table(folders))


@batch.command("run")
def batch_run(
    manifest: Annotated[str, typer.Argument(help="Parquet manifest: a path or s3:// address.")],
    output: Output,
    model: Model = "tiny",
    device: Device = "auto",
    strict: Annotated[bool, typer.Option(help="Refuse the whole batch for one bad row.")] = False,
    require_consent: Annotated[bool, typer.Option(help="Refuse rows without a consent_id.")] = False,
    several_faces: Annotated[
        Literal["largest", "reject"], typer.Option(help="In a photo of several people, take the largest or refuse.")
    ] = "largest",
    size: Size = None,
    frames: Frames = None,
    seconds: Seconds = None,
    steps: Steps = 50,
    seed: Seed = 42,
    guidance: Guidance = 6.0,
    fps: Fps = 16,
    face_similarity: Annotated[float | None, typer.Option(help="Similarity to the photo a video must reach.")] = None,
    tries: Annotated[int, typer.Option(help="Seeds to spend on reaching it.")] = 1,
    allow_root: Annotated[
        list[str] | None, typer.Option(help="Folder or s3://bucket/prefix for photos, beside the manifest's own.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="https host that photos may come from.")] = None,
    endpoint_url: EndpointUrl = None,
    renderers: Annotated[int, typer.Option(min=1, help="Engines side by side, each with a GPU of its own.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="http:// address of a Ray cluster's jobs server.")] = None,
    models: ModelsFolder = DEFAULT_MODELS,
    json: Json = False,
) -> None:
    """Render every row of a manifest; the same manifest and settings resume where they stopped.

    --size to --tries are for rows that leave them out. Ctrl-C cancels politely, a second one ends at once.
    """
    _quieten()
    live = LiveBatch(quiet=json)
    with live.shown():
        from prefect.exceptions import CancelledRun

        from echovideo.errors import RunError
        from flows.config import BatchSettings
        from flows.render import render_manifest, watcher
        from pipelines.manifest import Defaults

        settings = BatchSettings(
            defaults=Defaults(
                size=size,
                num_frames=frames,
                seconds=seconds,
                num_inference_steps=steps,
                seed=seed,
                guidance_scale=guidance,
                fps=fps,
                face_similarity=face_similarity,
                tries=tries,
            ),
            device=device,
            num_renderers=renderers,
            strict=strict,
            require_consent=require_consent,
            several_faces=several_faces,
            allowed_roots=tuple(allow_root or ()),
            allowed_hosts=tuple(allow_host or ()),
            endpoint_url=endpoint_url,
            models=str(models),
            jobs_address=cluster,
        )
        _reach_prefect()
        told = watcher.set(live)
        try:
            render_manifest(manifest, output, model, settings)
        except KeyboardInterrupt:
            err.print("Ended at once. Every committed video is kept; run the same batch again to resume.")
            raise
        except CancelledRun:
            pass
        except RunError as error:
            if error.code != "rows_failed":
                raise
        finally:
            watcher.reset(told)
    assert live.batch is not None
    ledger, config = _open_run(output, live.batch.ledger.run_id, endpoint_url)
    _print_run(ledger, config, live.batch.num_rows, json=json)
    unfinished = sum(live.counts[kind] for kind in ("failed", "dead", "cancelled"))
    raise typer.Exit(_ROWS_FAILED if unfinished else 0)


@batch.command("status")
def batch_status(output: Output, run_id: RunId = None, endpoint_url: EndpointUrl = None, json: Json = False) -> None:
    """Show how a run stands."""
    from pipelines.validation import validate

    ledger, config = _open_run(output, run_id, endpoint_url)
    manifest = validate(config)
    _print_run(ledger, config, len(manifest.requests) + len(manifest.refusals), json=json)


@batch.command("report")
def batch_report(output: Output, run_id: RunId = None, endpoint_url: EndpointUrl = None, json: Json = False) -> None:
    """Write a run's report, results table and contact sheet again, and print where the report is."""
    from pipelines.publish import publish
    from pipelines.validation import validate

    ledger, config = _open_run(output, run_id, endpoint_url)
    report = str(publish(config, validate(config), ledger))
    if json:
        print_json({"run_id": ledger.run_id, "report": report})
    else:
        out.print(report)


@batch.command("cancel")
def batch_cancel(output: Output, run_id: RunId = None, endpoint_url: EndpointUrl = None, json: Json = False) -> None:
    """Ask a run to stop within a step; what is done stays, and running it again resumes."""
    ledger, _ = _open_run(output, run_id, endpoint_url)
    ledger.request_cancel()
    if json:
        print_json({"run_id": ledger.run_id, "cancel_requested": True})
    else:
        out.print(f"run {ledger.run_id} will stop; its finished videos stay")


@batch.command("delete")
def batch_delete(
    output: Output,
    run_id: Annotated[str, typer.Argument(help="The run.")],
    yes: Yes = False,
    endpoint_url: EndpointUrl = None,
    json: Json = False,
) -> None:
    """Delete a run with its faces and pictures, and every video that no other run refers to."""
    ledger, _ = _open_run(output, run_id, endpoint_url)
    if not yes:
        typer.confirm(
            f"Delete run {run_id}: its report, faces and pictures, and every video that no other run refers to?",
            abort=True,
            err=True,
        )
    ledger.delete_run()
    if json:
        print_json({"run_id": run_id, "deleted": True})
    else:
        out.print(f"run {run_id} is deleted")


@app.command()
def ablate(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="What is kept, and where the findings are written.")],
    minutes: Annotated[float, typer.Option(help="Training time of an arm.")] = 4.0,
    seed: Annotated[list[int], typer.Option(help="Training seed; once for each.")] = [1, 2],  # noqa: B006
    pack: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Read runs packed elsewhere instead of training.")
    ] = None,
) -> None:
    """Train and score the paper's ablation on drawn people, on every GPU there is, and write its page."""
    from echovideo.tiny.ablate import run_ablation, unpack, write_findings

    if pack:
        folder.mkdir(parents=True, exist_ok=True)
        unpack(pack, folder)
    else:
        run_ablation(folder, minutes=minutes, seeds=seed)
    write_findings(folder, None)


def main() -> None:
    """Entry point of the `echovideo` script."""
    app()


def _quieten() -> None:
    """Settle what Prefect and Ray read from the environment while they are imported; what is set already stays."""
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        # A laptop's first start of Prefect's own server takes longer than the 20 s that Prefect allows.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)


def _reach_prefect() -> None:
    """Start Prefect's own server if none is configured, deaf to this terminal's Ctrl-C, which is ours to handle.

    Raises RunError `prefect_unreachable` when the configured server does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from echovideo.errors import RunError

    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    if error is not None:
        raise RunError(
            f"the Prefect server at {PREFECT_API_URL.value()} does not answer: {error!r}; start it, or unset "
            "PREFECT_API_URL to use one of this process's own",
            code="prefect_unreachable",
        ) from error


def _access(store: str, endpoint_url: str | None) -> Access:
    """Return the keys of the service whose store this is."""
    from pipelines.serving.access import Access
    from pipelines.storage import StorageOptions, StoragePath

    return Access(StoragePath.parse(store, StorageOptions(endpoint_url=endpoint_url)))


def _open_run(output: str, run_id: str | None, endpoint_url: str | None) -> tuple[Ledger, RunConfig]:
    """Return the ledger and config of a run, the newest if none is named."""
    from echovideo.errors import RunError
    from pipelines.config import RunConfig
    from pipelines.ledger import Ledger
    from pipelines.storage import StorageOptions, StoragePath

    root = StoragePath.parse(output, StorageOptions(endpoint_url=endpoint_url))
    records = {name: root / "runs" / name / "run.json" for name in (root / "runs").list_names()}
    started = {name: record.stat().modified_s for name, record in records.items() if record.exists()}
    if not started:
        raise RunError(f"there is no run under {root}; is this the output that was given to batch run?", code="no_run")
    if run_id is not None and run_id not in started:
        raise RunError(f"there is no run {run_id} under {root}; there are {', '.join(started)}", code="no_run")
    ledger = Ledger(root, run_id or max(started, key=lambda name: started[name]))
    return ledger, RunConfig.from_record(ledger.read_config())


def _print_run(ledger: Ledger, config: RunConfig, num_rows: int, *, json: bool) -> None:
    """Print how a run stands and where its results are."""
    from pipelines.publish import REPORT, RESULTS

    outcomes = ledger.outcomes()
    counts = ledger.counts()
    card = config.card
    waiting = num_rows - len(outcomes)
    videos = ledger.root / "videos"
    rows = [_row_line(outcome, videos) for _, outcome in sorted(outcomes.items())]
    troubled = [row for row in rows if row["outcome"] != "ok"]
    files = {name: str(ledger.folder / name) for name in (REPORT, RESULTS) if (ledger.folder / name).exists()}
    if json:
        print_json(
            {
                "run_id": ledger.run_id,
                "rows": num_rows,
                "waiting": waiting,
                "running": ledger.is_driven(),
                "counts": counts,
                "model": asdict(card),
                "cancel_requested": ledger.cancel_requested(),
                "without_video": troubled,
                "report": files.get(REPORT),
                "results": files.get(RESULTS),
                "videos": str(videos),
            }
        )
        return
    shown = rows if len(rows) <= _SHOWN_ROWS else troubled[:_SHOWN_ROWS]
    if shown:
        out.print(rows_table(shown), soft_wrap=False)
        if len(troubled) > len(shown):
            out.print(f"and {len(troubled) - len(shown)} more without a video", style="dim")
        out.print()
    state = Text.assemble(
        f"{num_rows} row{'s' if num_rows != 1 else ''}: ",
        counts_text(counts),
        f"  {waiting} waiting" if waiting else "",
        "  (running)" if ledger.is_driven() else "  (not running: batch run resumes)" if waiting else "",
    )
    facts: dict[str, object] = {"run": ledger.run_id, "": state}
    facts |= {"report": files.get(REPORT, "not written yet"), "results": files.get(RESULTS, "not written yet")}
    facts |= {"videos": videos, "model": f"{card.name}, {card.licence}"}
    out.print(facts_table(facts))
    if card.notice:
        err.print(Text(card.notice, style="yellow"))


def _row_line(outcome: RowOutcome, videos: StoragePath) -> dict[str, str]:
    """Return one row of `rows_table`, its video's path within the folder of videos."""
    from pipelines.outcome import Cancelled, Dead, Failed, Ok, Rejected, kind_of

    line = {"row_id": outcome.row_id, "outcome": kind_of(outcome), "code": "", "message": ""}
    match outcome:
        case Ok():
            return line | {"message": outcome.video.uri.removeprefix(f"{videos}/")}
        case Rejected() | Failed():
            return line | {"code": outcome.code, "message": outcome.message}
        case Dead():
            return line | {"message": outcome.message}
        case Cancelled():
            return line | {"message": "run the batch again to render it"}
