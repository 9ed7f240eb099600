"""A dataset of drawn people over Ray: a driver is killed, one goes on, and one finds half of the dataset gone."""

from __future__ import annotations

import hashlib
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from echovideo.conditioning import encode_prompt, face_posterior
from echovideo.faces.analyzer import FaceAnalyzer, FaceLimits
from echovideo.faces.packs import open_pack
from echovideo.footage.plan import FootageSettings, plan_take
from echovideo.footage.scan import scan_footage
from echovideo.footage.take import face_share, take_footage
from echovideo.settings import EngineSettings
from echovideo.training.dataset import Dataset, DatasetError, open_dataset
from echovideo.training.encode import ClipEncoder
from pipelines.outcome import Failed, Rejected
from pipelines.photo_reader import UriPolicy
from pipelines.storage import StorageOptions, StoragePath
from pipelines.training.data import DataConfig, DatasetSummary, prepare_dataset
from pipelines.training.outcome import ClipLedger, Prepared
from tests.echovideo.footage.drawn import FRAMES, drawn_clips, write
from tests.pipelines.training.data_jobs import DiesOnce

DEADLINE_S = 240


ONE_THREAD = EngineSettings(num_threads=1)


pytestmark = pytest.mark.usefixtures("ray_of_two_cpus")


@dataclass(frozen=True)
class Job:
    """A data job, what came of it, and which clips the killed driver had finished."""

    config: DataConfig
    summary: DatasetSummary
    finished_before: frozenset[str]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def ledger(self) -> ClipLedger:
        return ClipLedger(StoragePath.parse(self.config.output), self.summary.digest[:16])

    def claims(self, row_id: str) -> list[dict[str, object]]:
        folder = self.ledger.folder / "claims" / row_id
        return [(folder / name).read_json() for name in folder.list_names()]


def row(clip_id: str, uri: str, **changes: str | None) -> dict[str, str | None]:
    person = clip_id.split("-")[0]
    values = {"clip_id": clip_id, "clip_uri": uri, "caption": f"A person called {clip_id}.", "person_id": person}
    return {**values, "clip_group": None, "consent_id": f"consent-{person}", **changes}


def write_manifest(rows: list[dict[str, str | None]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, s3_options: StorageOptions) -> Job:
    """The dataset, its first driver killed as soon as one clip was finished."""
    footage = tmp_path_factory.mktemp("footage")
    clips = {name: drawn.frames for name, drawn in drawn_clips(FRAMES).items()}
    for name, frames in clips.items():
        write(frames, footage / f"{name}.mp4")
    write(np.concatenate((clips["ann-1"], clips["bob-1"]), axis=2), footage / "two.mp4")
    write(np.full((20, 96, 96, 3), 90, np.uint8), footage / "empty.mp4")
    write(clips["ann-1"][:10], footage / "short.mp4")
    (footage / "noise.mp4").write_bytes(b"no video" * 100)
    remote = StoragePath.parse("s3://echovideo/footage/ann-2.mp4", s3_options)
    remote.upload_file(footage / "ann-2.mp4")
    rows = [
        row("ann-1", "ann-1.mp4"),
        row("ann-2", str(remote)),
        row("bob-1", "bob-1.mp4"),
        row("bob-again", "bob-1.mp4"),
        row("two", "two.mp4"),
        row("empty", "empty.mp4"),
        row("short", "short.mp4"),
        row("noise", "noise.mp4"),
        row("gone", "gone.mp4"),
        row("silent", "ann-1.mp4", caption=None),
        row("unasked", "ann-1.mp4", consent_id=None),
    ]
    write_manifest(rows, footage / "clips.parquet")
    config = DataConfig(
        manifest=str(footage / "clips.parquet"),
        output=str(tmp_path_factory.mktemp("dataset")),
        model=str(tiny_folder),
        uri_policy=UriPolicy(roots=(str(footage),), s3_buckets=("echovideo",)),
        storage=s3_options,
        engine=ONE_THREAD,
    )
    finished = run_and_kill_driver(config, footage / "config.pickle")
    return Job(config=config, summary=prepare_dataset(config), finished_before=finished)


def run_and_kill_driver(config: DataConfig, path: Path) -> frozenset[str]:
    path.write_bytes(pickle.dumps(config))
    driver = subprocess.Popen([sys.executable, "-m", "tests.pipelines.training.data_jobs", str(path)])
    deadline = time.monotonic() + DEADLINE_S
    outcomes: list[Path] = []
    while not outcomes:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "no clip was finished"
        outcomes = list(Path(config.output).glob("runs/*/outcomes/*.json"))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (Path(config.output) / "dataset.json").exists()
    return frozenset(path.stem for path in outcomes)


@pytest.fixture(scope="module")
def dataset(job: Job) -> Dataset:
    return open_dataset(job.folder)


def test_every_row_has_its_typed_outcome(job: Job) -> None:
    outcomes = job.summary.outcomes
    assert {name: outcome.code for name, outcome in outcomes.items() if isinstance(outcome, Rejected)} == {
        "two": "several_people",
        "empty": "no_face",
        "short": "too_short",
        "noise": "unreadable",
        "silent": "no_caption",
        "unasked": "consent_missing",
    }
    assert "/noise: Invalid data found" in getattr(outcomes["noise"], "message", "")
    assert {name: outcome.code for name, outcome in outcomes.items() if isinstance(outcome, Failed)} == {
        "gone": "not_found"
    }
    kept = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Prepared)}
    assert {name: (len(outcome.references), outcome.shots, outcome.face_frames) for name, outcome in kept.items()} == {
        "ann-1": (3, 1, 24),
        "ann-2": (3, 1, 24),
        "bob-1": (3, 1, 24),
        "bob-again": (3, 1, 24),
    }
    assert {name: (outcome.example.clip_group, outcome.warning) for name, outcome in kept.items()} == {
        "ann-1": ("ann-1", ""),
        "ann-2": ("ann-2", ""),
        "bob-1": ("bob-1", "one_clip"),
        "bob-again": ("bob-1", "one_clip"),
    }
    assert job.summary.counts == {"ok": 4, "rejected": 6, "failed": 1, "dead": 0, "cancelled": 0}


def test_clip_that_the_killed_driver_finished_is_not_made_again(job: Job) -> None:
    assert job.finished_before
    for row_id in job.finished_before:
        assert [claim["epoch"] for claim in job.claims(row_id)] == [1]
    epochs = {claim["epoch"] for outcome in job.ledger.outcomes().values() for claim in job.claims(outcome.row_id)}
    assert epochs == {1, 2}


def test_dataset_card_says_what_made_it(job: Job, dataset: Dataset) -> None:
    assert dataset.card.digest == job.summary.digest
    assert dataset.card.licence == "Apache-2.0"
    assert dataset.card.buckets == {"96x96x17": {"count": 4}}
    assert dataset.card.making["face_nets"].startswith("dlib-")
    assert dataset.card.making["footage"]["sizes"] == [[96, 96]]


def test_shards_are_named_by_their_own_digest_and_nothing_else_lies_beside_them(job: Job, dataset: Dataset) -> None:
    shards = {path.name: path for path in (job.folder / "shards").iterdir()}
    assert set(shards) == {example.shard for example in dataset.examples}
    for name, path in shards.items():
        assert name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"


def test_tensors_are_the_encoders_own_of_the_same_frames_and_words(
    job: Job, dataset: Dataset, tiny_folder: Path, tmp_path: Path
) -> None:
    path = write(drawn_clips(FRAMES)["ann-2"].frames, tmp_path / "ann-2.mp4")
    analyzer = FaceAnalyzer(open_pack(tiny_folder / "face_encoder"), FaceLimits(min_face_px=24))
    settings = FootageSettings.from_record(dataset.card.making["footage"])
    take = take_footage(path, plan_take(scan_footage(path, analyzer, 16), settings), analyzer, "")
    encoder = ClipEncoder(tiny_folder, ONE_THREAD)

    (example,) = (item for item in dataset.examples if item.clip_id == "ann-2")
    tensors = dataset.example_tensors(example)
    assert tensors.latents_mean_FCHW.shape == (5, 16, 12, 12)
    expected = encoder.example(take, "A person called ann-2.")
    torch.testing.assert_close(tensors.latents_mean_FCHW, expected.latents_mean_FCHW.bfloat16())
    torch.testing.assert_close(tensors.latents_std_FCHW, expected.latents_std_FCHW.bfloat16())
    text = encode_prompt(encoder.tokenizer, encoder.text_encoder, "A person called ann-2.", encoder.tokens)
    torch.testing.assert_close(tensors.text_ND, text[0].bfloat16())
    np.testing.assert_array_equal(tensors.face_share_FHW.numpy(), face_share(take.face_FHW))

    references = dataset.in_clip(example)
    assert [item.frame_index for item in references] == list(take.references)
    face = dataset.reference_tensors(references[0], 96, 96)
    identity = take.references[references[0].frame_index]
    np.testing.assert_allclose(face.embedding_D.numpy(), identity.embedding, atol=1e-5)
    mean, std = face_posterior(encoder.vae, identity.face_image, 96, 96)
    torch.testing.assert_close(face.posteriors[96, 96], (mean.bfloat16(), std.bfloat16()))
    assert references[0].face_px == pytest.approx(identity.quality.face_px)
    torch.testing.assert_close(dataset.null().tokens_ND, encoder.null().tokens_ND.bfloat16())


def test_cross_clip_references_are_the_persons_other_clip_and_refused_with_one_clip_only(dataset: Dataset) -> None:
    by_clip = {example.clip_id: example for example in dataset.examples}
    assert {item.clip_id for item in dataset.cross_clip(by_clip["ann-1"])} == {"ann-2"}
    with pytest.raises(DatasetError, match="bob") as caught:
        dataset.check_cross_clip()
    assert caught.value.code == "one_clip"


def test_report_and_table_show_every_clip(job: Job) -> None:
    page = (job.folder / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    for text in ("It is not clear who is meant.", "A person called ann-2.", "cross-clip references will refuse"):
        assert text in page
    rows = {line["clip_id"]: line for line in pq.read_table(job.folder / "clips.parquet").to_pylist()}
    assert set(rows) == set(job.summary.outcomes)
    assert (rows["bob-1"]["warning"], rows["bob-1"]["bucket"]) == ("one_clip", "96x96x17")
    assert rows["short"]["code"] == "too_short"
    assert dict(rows["short"]["numbers"])["run_frames"] == 10


def test_second_run_makes_lost_shards_again_deletes_what_is_asked_for_no_more_and_survives_its_worker(
    job: Job, dataset: Dataset
) -> None:
    shards = {example.clip_id: job.folder / "shards" / example.shard for example in dataset.examples}
    before = shards["ann-1"].read_bytes()
    untouched = shards["ann-2"].stat().st_mtime_ns
    shards["ann-1"].unlink()
    kept = [row for row in pq.read_table(job.config.manifest).to_pylist() if row["clip_id"].startswith("ann")]
    manifest = Path(job.config.manifest).with_name("fewer.parquet")
    write_manifest(kept, manifest)
    of_other_settings = job.folder / "runs" / "of-other-settings" / "sheets" / "two.jpg"
    of_other_settings.parent.mkdir(parents=True)
    of_other_settings.write_bytes(b"a picture of two people")

    summary = prepare_dataset(replace(job.config, manifest=str(manifest)), DiesOnce)

    assert summary.counts["ok"] == 2
    assert summary.digest == job.summary.digest
    assert (job.folder / "died").exists()
    again = summary.outcomes["ann-1"]
    assert isinstance(again, Prepared)
    assert [claim["strikes"] for claim in job.claims(again.row_id)] == [0, 1]
    # The same footage through the same nets gives the same bytes.
    assert shards["ann-1"].read_bytes() == before
    assert shards["ann-2"].stat().st_mtime_ns == untouched
    assert not shards["bob-1"].exists()
    names = [path.name for path in job.folder.glob("runs/*/*/*")]
    assert not [name for name in names if name.startswith(("bob-1", "gone", "two"))]
    assert [item.clip_id for item in open_dataset(job.folder).examples] == ["ann-1", "ann-2"]
    assert json.loads((job.folder / "dataset.json").read_text())["buckets"] == {"96x96x17": {"count": 2}}
