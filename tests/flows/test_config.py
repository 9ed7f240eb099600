"""Runs from plain parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from echovideo.errors import RunError, WeightsError
from echovideo.tiny.folder import tiny_folder
from flows.config import BatchSettings, plan_run, policy_for
from pipelines.manifest import Defaults
from pipelines.storage import StoragePath
from tests.flows.conftest import make_manifest


@pytest.fixture
def manifest(photos: Path, tmp_path: Path) -> Path:
    return make_manifest(tmp_path / "manifest.parquet", photos, {"one": "astronaut.png"})


def settings(models: Path, **values: object) -> BatchSettings:
    return BatchSettings(models=str(models), **values)  # type: ignore[arg-type]


def test_plan_run_photo_outside_the_manifest_s_folder_is_refused_unless_allowed(
    manifest: Path, photos: Path, models: Path, tmp_path: Path
) -> None:
    _, refused = plan_run(str(manifest), str(tmp_path / "out"), "tiny", settings(models))
    assert [refusal.code for refusal in refused.refusals] == ["uri_not_allowed"]
    allowed = settings(models, allowed_roots=(str(photos), "s3://faces/studio"), allowed_hosts=("Photos.Example",))
    config, checked = plan_run(str(manifest), str(tmp_path / "out"), "tiny", allowed)
    assert [request.row_id for request in checked.requests] == ["one"]
    assert config.uri_policy.roots == (str(tmp_path), str(photos))
    assert config.uri_policy.s3_buckets == ("faces/studio",)
    assert config.uri_policy.https_hosts == ("photos.example",)


def test_policy_of_a_manifest_on_s3_allows_its_bucket_and_of_others_what_was_named() -> None:
    policy = policy_for(StoragePath.parse("s3://own/manifests/a.parquet"), ("s3://faces/studio/",), ())
    assert policy.s3_buckets == ("own", "faces/studio")


def test_plan_run_same_parameters_are_the_same_run_and_others_another(
    manifest: Path, models: Path, tmp_path: Path
) -> None:
    first, _ = plan_run(str(manifest), str(tmp_path / "out"), "tiny", settings(models))
    again, _ = plan_run(str(manifest), str(tmp_path / "out"), "tiny", settings(models))
    other, _ = plan_run(str(manifest), str(tmp_path / "out"), "tiny", settings(models, defaults=Defaults(seed=7)))
    assert first == again
    assert first.run_id != other.run_id
    assert (first.ray_address, first.model) == ("local", str(tiny_folder(models)))


def test_plan_run_without_size_and_length_takes_those_of_the_model(
    manifest: Path, models: Path, tmp_path: Path
) -> None:
    config, _ = plan_run(str(manifest), str(tmp_path / "out"), "tiny", settings(models))
    assert (config.defaults.size, config.defaults.num_frames) == ("96x96", 17)


def test_plan_run_bad_manifest_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    with pytest.raises(RunError) as refusal:
        plan_run(str(tmp_path / "bad.parquet"), str(tmp_path / "out"), "no such model", BatchSettings())
    assert refusal.value.code == "manifest"


@pytest.mark.parametrize("model", ["/nowhere", "my models/EchoVideo", "owner/name/more"])
def test_plan_run_unknown_model_is_an_error(model: str, manifest: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"there is no model folder {model}"):
        plan_run(str(manifest), str(tmp_path / "out"), model, settings(models))


def test_plan_run_cluster_without_a_device_asks_for_one(manifest: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as refusal:
        plan_run(str(manifest), str(tmp_path), "tiny", settings(models, jobs_address="http://cluster:8265"))
    assert refusal.value.code == "device_unknown"
    named = settings(models, jobs_address="http://cluster:8265", device="cpu")
    config, _ = plan_run(str(manifest), str(tmp_path), "tiny", named)
    assert config.ray_address == "auto"
