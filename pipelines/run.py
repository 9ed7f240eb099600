"""The driver of a run: `python -m pipelines.run RUN_JSON` takes a recorded run to its end and publishes its views."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from echovideo.errors import EchoVideoError, RunError
from echovideo.model.card import folder_digest
from pipelines import graph
from pipelines.config import RunConfig
from pipelines.ledger import Ledger
from pipelines.outcome import kind_of
from pipelines.publish import publish
from pipelines.resources import check_resources
from pipelines.stages.condition import ConditionStage
from pipelines.stages.identity import IdentityStage
from pipelines.stages.render import RenderStage
from pipelines.stages.stage import Stage
from pipelines.storage import StorageOptions, StoragePath
from pipelines.validation import check_identities, validate

STAGES: tuple[type[Stage], ...] = (IdentityStage, ConditionStage, RenderStage)


def drive(config: RunConfig, stages: Sequence[type[Stage]] = STAGES) -> dict[str, int]:
    """Bring every row of the run to one outcome, publish the views, and return the counts by outcome.

    Committed rows are left out before the graph is built. Raises RunError: `already_running`, `too_few_resources`,
    `model_changed`, `manifest_changed`, `identity_changed`, `refused_rows`.
    """
    manifest = validate(config)
    check_identities(config, manifest)
    if folder_digest(Path(config.model)) != config.model_digest:
        raise RunError(f"the model in {config.model} has changed since the run was submitted", code="model_changed")
    ledger = Ledger(config.output_path, config.run_id)
    ledger.write_config(config.to_record())
    with ledger.open_epoch() as epoch:
        for refusal in manifest.refusals:
            ledger.commit(refusal.outcome(), epoch.number)
        remaining = set(ledger.remaining(request.row_id for request in manifest.requests))
        if remaining:
            start_ray(config.ray_address)
            check_resources(tuple(config.stages().values()), ray.cluster_resources())
            requests = [request for request in manifest.requests if request.row_id in remaining]
            for outcome in graph.outcomes(requests, config, epoch.number, stages):
                print(f"{outcome.row_id}: {kind_of(outcome)}", flush=True)
        publish(config, manifest, ledger)
    return ledger.counts()


def start_ray(address: str) -> None:
    """Start ("local") or join the Ray at an address, unless this process has one already."""
    if ray.is_initialized():
        return
    ray.init(
        address=address,
        log_to_driver=False,
        include_dashboard=False if address == "local" else None,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the child process and of the Ray job; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.run", description=__doc__)
    parser.add_argument("run_json", help="address of a run's run.json")
    parser.add_argument("--endpoint-url", default=None, help="S3 endpoint that serves it, if not AWS's")
    options = parser.parse_args(arguments)
    # A Ray that this process starts reports to nobody, unless its operator says otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = StoragePath.parse(options.run_json, StorageOptions(endpoint_url=options.endpoint_url))
    try:
        counts = drive(RunConfig.from_record(path.read_json()))
    except EchoVideoError as error:
        print(json.dumps({"error": error.code, "message": error.message}), file=sys.stderr, flush=True)
        return 1
    print(json.dumps(counts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
