"""Whole runs over Ray Data: what faults, cancellation, the face gate and a second run leave in the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest

from echovideo.errors import RunError
from echovideo.model.card import folder_digest, read_card
from echovideo.request import RenderRequest
from echovideo.video import decode_mp4
from pipelines.config import RunConfig
from pipelines.ledger import Ledger
from pipelines.manifest import write_manifest
from pipelines.outcome import Dead, Failed, Ok, Rejected
from pipelines.photo_reader import UriPolicy
from pipelines.publish import publish
from pipelines.run import drive
from pipelines.stages.condition import ConditionStage
from pipelines.stages.identity import IdentityStage
from pipelines.stages.row import Row
from pipelines.storage import StoragePath
from pipelines.validation import validate
from tests.pipelines.stub_stages import STUBS, renders_log

SHAPE = {"height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 2}


pytestmark = pytest.mark.usefixtures("ray_of_two_cpus")


def row(row_id: str, seed: int = 0, **values: object) -> RenderRequest:
    return RenderRequest(**{"row_id": row_id, "prompt": "p", "photo_bytes": b"x", "seed": seed, **SHAPE, **values})


def config_for(rows: list[RenderRequest], folder: Path, model: Path, **changes: object) -> RunConfig:
    manifest = StoragePath.parse(str(folder / "manifest.parquet"))
    write_manifest(rows, manifest)
    return RunConfig(
        **{
            "manifest": str(manifest),
            "manifest_digest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "output": str(folder / "out"),
            "model": str(model),
            "model_digest": folder_digest(model),
            "card": read_card(model),
            "uri_policy": UriPolicy(roots=(str(folder),)),
            **changes,
        }
    )


def ledger_of(config: RunConfig) -> Ledger:
    return Ledger(config.output_path, config.run_id)


def renders(config: RunConfig) -> Counter[str]:
    log = renders_log(config)
    return Counter(line.split()[0] for line in log.read_text().splitlines()) if log.exists() else Counter()


def wait_until(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


MIXED = [
    *(row(f"good-{i}", i) for i in range(4)),
    row("kills-render", 10, tags={"kill": "render"}),
    row("kills-identity", 11, tags={"kill": "identity"}),
    row("raises", 12, tags={"raise": "condition"}),
    row("stranger", 21, face_similarity=0.5, tries=3),
    row("herself", 22, face_similarity=0.5, tries=3, height=256, width=256, tags={"face": "yes"}),
    row("ungated", 23, tries=3),
    row("bad", tier="high"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> RunConfig:
    """A finished run of rows that each meet another fate."""
    config = config_for(MIXED, tmp_path_factory.mktemp("mixed"), stub_model)
    drive(config, STUBS)
    return config


def test_run_every_row_has_one_outcome_in_ledger_and_results(mixed: RunConfig) -> None:
    ledger = ledger_of(mixed)
    assert ledger.counts() == {"ok": 6, "rejected": 2, "failed": 1, "dead": 2, "cancelled": 0}
    row_ids = sorted(request.row_id for request in MIXED)
    assert sorted(ledger.outcomes()) == row_ids
    table = pq.read_table(Path(str(ledger.folder)) / "results.parquet")
    assert sorted(table["row_id"].to_pylist()) == row_ids


@pytest.mark.parametrize("stage", ["render", "identity"])
def test_run_row_that_kills_its_worker_ends_dead_after_three_strikes(mixed: RunConfig, stage: str) -> None:
    dead = ledger_of(mixed).outcomes()[f"kills-{stage}"]
    assert isinstance(dead, Dead)
    assert dead.strikes == 3
    assert stage in dead.message


def test_run_row_that_raises_ends_failed_with_its_stage_and_traceback(mixed: RunConfig) -> None:
    failed = ledger_of(mixed).outcomes()["raises"]
    assert isinstance(failed, Failed)
    assert (failed.stage, failed.code) == ("condition", "unexpected")
    assert "as the row raises says" in failed.traceback


def test_run_row_refused_by_validation_ends_rejected(mixed: RunConfig) -> None:
    bad = ledger_of(mixed).outcomes()["bad"]
    assert isinstance(bad, Rejected)
    assert bad.code == "tier_unavailable"


def test_run_face_below_the_gate_spends_its_tries_and_keeps_the_best(mixed: RunConfig) -> None:
    stranger = ledger_of(mixed).outcomes()["stranger"]
    assert isinstance(stranger, Rejected)
    assert stranger.code == "face_similarity"
    assert stranger.numbers["takes"] == 3
    assert stranger.video is not None
    assert Path(stranger.video.uri).stat().st_size == stranger.video.num_bytes
    sidecar = json.loads(Path(stranger.sidecar_uri or "").read_text())
    assert sidecar["takes"][0]["seed"] == 21
    assert len({take["seed"] for take in sidecar["takes"]}) == 3


def test_run_face_above_the_gate_needs_one_take(mixed: RunConfig) -> None:
    outcomes = ledger_of(mixed).outcomes()
    herself, ungated = outcomes["herself"], outcomes["ungated"]
    assert isinstance(herself, Ok)
    assert herself.seeds_tried == (22,)
    assert herself.detection_rate == 1.0
    assert herself.face_similarity is not None
    assert herself.face_similarity > 0.5
    assert isinstance(ungated, Ok)
    assert ungated.detection_rate == 0.0
    assert ungated.seeds_tried == (23,)


def test_run_driver_killed_and_started_again_renders_nothing_committed_twice(tmp_path: Path, stub_model: Path) -> None:
    rows = [row(f"row-{i}", i) for i in range(8)]
    config = config_for(rows, tmp_path, stub_model)
    record = tmp_path / "run.json"
    record.write_text(json.dumps(config.to_record()))
    command = [sys.executable, "-m", "tests.pipelines.stub_stages", str(record)]
    paths = os.pathsep.join(["kernels", ".", os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    ledger = ledger_of(config)
    wait_until(lambda: ledger.counts()["ok"] >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    at_kill = {row_id for row_id, outcome in ledger.outcomes().items() if isinstance(outcome, Ok)}
    assert 2 <= len(at_kill) < 8

    assert drive(config, STUBS) == {"ok": 8, "rejected": 0, "failed": 0, "dead": 0, "cancelled": 0}
    rendered = renders(config)
    assert {row_id: rendered[row_id] for row_id in at_kill} == dict.fromkeys(at_kill, 1)
    # What was in flight at the kill may be rendered again: one row on the GPU and one being encoded.
    assert sum(rendered.values()) <= 8 + 2
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 8


def test_run_cancelled_keeps_what_is_done_and_the_next_run_finishes(tmp_path: Path, stub_model: Path) -> None:
    rows = [row(f"row-{i}", i) for i in range(16)]
    config = config_for(rows, tmp_path, stub_model)
    ledger = ledger_of(config)

    def cancel_after_the_first() -> None:
        wait_until(lambda: ledger.counts()["ok"] >= 1)
        ledger.request_cancel()

    canceller = Thread(target=cancel_after_the_first)
    canceller.start()
    counts = drive(config, STUBS)
    canceller.join()
    assert counts["ok"] + counts["cancelled"] == 16
    assert counts["ok"] >= 1
    assert counts["cancelled"] >= 1
    before = renders(config)

    ledger.withdraw_cancel()
    assert drive(config, STUBS)["ok"] == 16
    assert all(count == 1 for row_id, count in renders(config).items() if row_id in before)


def test_run_same_pixels_under_another_row_reuse_the_video(tmp_path: Path, stub_model: Path) -> None:
    first = config_for([row("first")], tmp_path, stub_model)
    drive(first, STUBS)
    second = config_for([row("second"), row("other", 1)], tmp_path, stub_model)
    assert second.run_id != first.run_id
    drive(second, STUBS)
    original = ledger_of(first).outcomes()["first"]
    again = ledger_of(second).outcomes()["second"]
    assert isinstance(original, Ok)
    assert isinstance(again, Ok)
    assert again.reused
    assert again.video == original.video
    assert renders(second) == {"first": 1, "other": 1}


def test_run_that_cannot_start_is_refused_before_any_work(tmp_path: Path, stub_model: Path) -> None:
    config = config_for([row("a")], tmp_path, stub_model, num_renderers=50)
    with pytest.raises(RunError, match="the cluster has 2") as caught:
        drive(config, STUBS)
    assert caught.value.code == "too_few_resources"
    for change, code in (({"model_digest": "0"}, "model_changed"), ({"manifest_digest": "0"}, "manifest_changed")):
        with pytest.raises(RunError) as caught:
            drive(replace(config, **change), STUBS)
        assert caught.value.code == code
    assert ledger_of(config).counts()["ok"] == 0


def test_run_of_a_damaged_model_is_refused_with_the_file(tmp_path: Path, tiny_folder: Path) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = config_for([row("a")], tmp_path, model)
    with pytest.raises(RunError, match=r"diffusion_pytorch_model.safetensors is truncated") as caught:
        drive(config)
    assert caught.value.code == "stage_failed"


def test_drivers_load_no_library_of_networks() -> None:
    # A driver opens no network, and their classes would double its start and its memory.
    program = (
        "import sys, pipelines.run, pipelines.training.data; "
        "sys.exit(not {'diffusers', 'transformers'}.isdisjoint(sys.modules))"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_run_strict_with_a_bad_row_is_refused_whole(tmp_path: Path, stub_model: Path) -> None:
    config = config_for([row("good"), row("bad", tier="high")], tmp_path, stub_model, strict=True)
    with pytest.raises(RunError, match="row 1: tier") as caught:
        drive(config, STUBS)
    assert caught.value.code == "refused_rows"
    assert ledger_of(config).outcomes() == {}


def test_run_of_a_manifest_without_rows_ends_well(tmp_path: Path, stub_model: Path) -> None:
    config = config_for([], tmp_path, stub_model)
    assert sum(drive(config, STUBS).values()) == 0
    assert pq.read_table(str(ledger_of(config).folder / "results.parquet")).num_rows == 0


def test_publish_before_a_driver_began_counts_the_rows_that_wait(tmp_path: Path, stub_model: Path) -> None:
    config = config_for([row("waits")], tmp_path, stub_model)
    ledger_of(config).write_config(config.to_record())
    report = publish(config, validate(config), ledger_of(config)).read_bytes().decode()
    assert re.search(r"rows not ended yet</th>\s*<td>1</td>", report)


def test_stages_many_rows_of_one_photo_analyse_and_encode_it_once(
    tmp_path: Path, tiny_folder: Path, astronaut_png: bytes
) -> None:
    rows = [row(f"row-{i}", i, photo_bytes=astronaut_png) for i in range(20)]
    config = config_for(rows, tmp_path, tiny_folder)
    identity, condition = IdentityStage(config, 1), ConditionStage(config, 1)
    analyses = []
    analyze = identity.analyzer.analyze
    identity.analyzer.analyze = lambda *args, **options: analyses.append(1) or analyze(*args, **options)
    conditions = {condition(identity(Row(request=request).to_columns()))["condition"] for request in rows}
    assert len(analyses) == 1
    assert len(conditions) == 1
    assert condition.conditioner.prompt_states.cache_info().misses == 2
    assert condition.conditioner.face_tokens.cache_info().misses == 2
    assert condition.conditioner.posterior.cache_info().misses == 1


def test_run_tiny_model_on_s3_renders_real_photographs(
    s3_root: StoragePath, tiny_folder: Path, tmp_path: Path, astronaut_png: bytes, hopper_jpg: bytes
) -> None:
    root = s3_root / "real"
    for name, data in (("collins.png", astronaut_png), ("hopper.jpg", hopper_jpg), ("text.jpg", b"no photo")):
        (root / "photos" / name).write_bytes(data)
    rows = [
        row(f"{name}-{seed}", seed, photo_bytes=None, photo_uri=f"photos/{file}")
        for name, file, seeds in (("collins", "collins.png", 2), ("hopper", "hopper.jpg", 1), ("text", "text.jpg", 1))
        for seed in range(seeds)
    ]
    manifest = root / "manifest.parquet"
    write_manifest(rows, manifest)
    config = RunConfig(
        manifest=str(manifest),
        manifest_digest=hashlib.sha256(manifest.read_bytes()).hexdigest(),
        output=str(root / "out"),
        model=str(tiny_folder),
        model_digest=folder_digest(tiny_folder),
        card=read_card(tiny_folder),
        uri_policy=UriPolicy(s3_buckets=(str(root).split("/")[2],)),
        storage=root.options,
    )
    assert drive(config) == {"ok": 3, "rejected": 1, "failed": 0, "dead": 0, "cancelled": 0}

    ledger = ledger_of(config)
    outcomes = ledger.outcomes()
    refused = outcomes["text-0"]
    assert isinstance(refused, Rejected)
    assert refused.code == "not_an_image"
    videos = {}
    for row_id in ("collins-0", "collins-1", "hopper-0"):
        outcome = outcomes[row_id]
        assert isinstance(outcome, Ok)
        data = StoragePath.parse(outcome.video.uri, root.options).read_bytes()
        assert hashlib.sha256(data).hexdigest() == outcome.video.sha256
        assert decode_mp4(data).shape == (17, 96, 96, 3)
        assert {"identity", "condition", "denoise", "decode", "encode", "judge"} <= set(outcome.timings)
        assert outcome.face_similarity is not None
        # The same person's photographs are alike from 0.535 on, and the model knows no real person.
        assert -1 <= outcome.face_similarity < 0.535
        videos[row_id] = outcome.video.sha256
    assert len(set(videos.values())) == 3
    # Two people, three good rows: two identities were made.
    assert len((ledger.folder / "identities").list_names()) == 2
    report = (ledger.folder / "report.html").read_bytes().decode()
    assert "a drawn world" in report
    assert "collins-1" in report

    again = replace(config, output=str(root / "again"))
    drive(again)
    repeated = ledger_of(again).outcomes()
    assert {row_id: repeated[row_id].video.sha256 for row_id in videos} == videos
