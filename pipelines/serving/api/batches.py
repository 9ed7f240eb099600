"""/v1/batches: manifests, rendered behind single requests, and the files of the tenant's runs."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from echovideo.errors import RequestError, RunError, StorageError
from pipelines.config import RunConfig
from pipelines.ledger import Ledger
from pipelines.manifest import Defaults
from pipelines.serving.api.bodies import read_json, stored_file
from pipelines.serving.api.problems import ProblemError, not_found, responses
from pipelines.serving.api.schemas import Batch, BatchCreate, BatchDeleted, BatchList
from pipelines.serving.api.service import Admin, Maker, Reader, Service, ServiceHere
from pipelines.serving.config import ServiceConfig
from pipelines.validation import with_identities

router = APIRouter(prefix="/v1", tags=["batches"])
BatchId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="The batch's id.")]

_FILES = {
    re.compile(r"runs/[0-9a-f]{16}/report\.html"): "text/html; charset=utf-8",
    re.compile(r"runs/[0-9a-f]{16}/results\.parquet"): "application/vnd.apache.parquet",
    re.compile(r"runs/[0-9a-f]{16}/contact_sheet\.png"): "image/png",
    re.compile(r"videos/[0-9a-f]{2}/[0-9a-f]{64}-[0-9a-f]{16}\.mp4"): "video/mp4",
    re.compile(r"videos/[0-9a-f]{2}/[0-9a-f]{64}\.json"): "application/json",
}
_REPORT_POLICY = "default-src 'none'; img-src data:; media-src 'self' data:; style-src 'unsafe-inline'"
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchCreate"}}},
    }
}


@router.post(
    "/batches",
    status_code=202,
    response_model=Batch,
    responses=responses(400, 409, 413, 415, 429),
    openapi_extra=_BODY,
)
async def create_batch(request: Request, service: ServiceHere, caller: Maker) -> Any:
    """Accept a manifest, once every row of it has been checked.

    The same manifest and settings are the same batch: asked again, it is followed, or goes on where it stopped.
    """
    asked = await read_json(request, BatchCreate)
    if asked.num_frames is not None and asked.seconds is not None:
        raise RequestError("give num_frames or seconds, not both", code="invalid_num_frames")
    await service.ask("allow", caller.key)
    # A client that hangs up meanwhile must not leave a batch that is accepted and not begun.
    return await asyncio.shield(asyncio.ensure_future(_start(service, caller.key.tenant, asked)))


async def _start(service: Service, tenant: str, asked: BatchCreate) -> Any:
    try:
        run = await asyncio.to_thread(_accept, service.config, tenant, asked)
    except (RunError, StorageError) as error:
        if isinstance(error, StorageError) and error.code not in ("not_found", "uri_not_allowed"):
            raise
        # Where the store lies is not the tenant's to know.
        shown = error.message.replace(f"{service.config.tenant_root(tenant)}/", "")
        raise ProblemError(422, error.code, shown) from error
    return await service.ask("start_batch", tenant, run, within_s=60.0)


@router.get("/batches", response_model=BatchList, responses=responses())
async def list_batches(service: ServiceHere, caller: Reader) -> Any:
    """List the tenant's batches, the newest first."""
    return {"object": "list", "data": await service.ask("all_batches", caller.key.tenant)}


@router.get("/batches/{batch_id}", response_model=Batch, responses=responses(404))
async def retrieve_batch(service: ServiceHere, caller: Reader, batch_id: BatchId) -> Any:
    """Return how a batch stands, and where its results are."""
    view = await service.ask("batch", caller.key.tenant, batch_id)
    if view is None:
        raise not_found(f"batch {batch_id}")
    return view


@router.post("/batches/{batch_id}/cancel", response_model=Batch, responses=responses(404))
async def cancel_batch(service: ServiceHere, caller: Maker, batch_id: BatchId) -> Any:
    """Stop a batch before its rows' next steps; finished videos stay, and asking again goes on."""
    view = await service.ask("cancel_batch", caller.key.tenant, batch_id)
    if view is None:
        raise not_found(f"batch {batch_id}")
    return view


@router.delete("/batches/{batch_id}", response_model=BatchDeleted, responses=responses(404, 409))
async def delete_batch(service: ServiceHere, caller: Admin, batch_id: BatchId) -> Any:
    """Delete a batch that has ended, its faces, report and every video that nothing else refers to."""
    if not await service.ask("delete_batch", caller.key.tenant, batch_id, within_s=60.0):
        raise not_found(f"batch {batch_id}")
    return {"id": batch_id, "object": "batch.deleted", "deleted": True}


@router.get(
    "/files/{path:path}",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {kind.partition(";")[0]: {} for kind in _FILES.values()}},
        206: {"description": "The range asked for"},
        304: {"description": "Not changed"},
        **responses(404, 416),
    },
)
async def download_file(request: Request, service: ServiceHere, caller: Reader, path: str) -> Response:
    """Return a view or a video of the tenant's runs, under the names that reports link to."""
    for pattern, media_type in _FILES.items():
        if pattern.fullmatch(path):
            stored = service.config.tenant_root(caller.key.tenant) / path
            response = await stored_file(request, stored, media_type, f"file {path}")
            response.headers["Content-Security-Policy"] = _REPORT_POLICY
            return response
    raise not_found(f"file {path[:200]}")


def _accept(config: ServiceConfig, tenant: str, asked: BatchCreate) -> RunConfig:
    """Check a manifest whole and record the run; raises what `validate` and `ServiceConfig.batch` raise."""
    manifest = asked.manifest
    if "://" not in manifest and not manifest.startswith("/"):
        if "\0" in manifest or any(part in ("", ".", "..") for part in manifest.split("/")):
            raise RequestError(f"manifest {manifest!r} is no plain path", code="invalid_manifest")
        manifest = str(config.tenant_root(tenant) / "inputs" / manifest)
    defaults = Defaults(**asked.model_dump(exclude={"manifest", "require_consent"}))
    run = config.batch(tenant, manifest, defaults, require_consent=asked.require_consent)
    run, checked = with_identities(run)
    ledger = Ledger(run.output_path, run.run_id)
    ledger.write_config(run.to_record())
    (ledger.folder / "accepted.json").write_json_if_absent(
        {"created_at": time.time(), "num_rows": len(checked.requests) + len(checked.refusals)}
    )
    return run
