import json
from dataclasses import replace
from typing import Any

import pytest

from echovideo.errors import RunError
from echovideo.model.card import ModelCard
from echovideo.settings import EngineSettings
from pipelines.config import RunConfig
from pipelines.manifest import Defaults
from pipelines.photo_reader import UriPolicy
from pipelines.resources import SPARE_CPUS

CONFIG = RunConfig(
    manifest="m.parquet",
    manifest_digest="1" * 64,
    output="out",
    model="models/tiny",
    model_digest="2" * 64,
    card=ModelCard(name="tiny", licence="Apache-2.0", judged=False),
    defaults=Defaults(seed=3, tags={"studio": "north"}),
    uri_policy=UriPolicy(roots=("/photos",), https_hosts=("example.com",)),
)


def test_config_read_back_from_json_is_equal_and_the_same_run() -> None:
    again = RunConfig.from_record(json.loads(json.dumps(CONFIG.to_record())))
    assert again == CONFIG
    assert again.run_id == CONFIG.run_id


@pytest.mark.parametrize("change", [{"later": 1}, {"engine": {"precision": "int4"}}])
def test_config_of_another_release_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="recorded by another release") as refusal:
        RunConfig.from_record({**CONFIG.to_record(), **change})
    assert refusal.value.code == "other_release"


@pytest.mark.parametrize(
    "change", [{"model": "elsewhere"}, {"output": "other"}, {"num_renderers": 8}, {"ray_address": "auto"}]
)
def test_run_id_where_and_how_wide_do_not_change_it(change: dict[str, Any]) -> None:
    assert replace(CONFIG, **change).run_id == CONFIG.run_id


@pytest.mark.parametrize(
    "change",
    [
        {"manifest_digest": "3" * 64},
        {"model_digest": "3" * 64},
        {"defaults": Defaults(seed=4)},
        {"engine": EngineSettings(num_threads=1)},
        {"several_faces": "reject"},
        {"require_consent": True},
    ],
)
def test_run_id_what_decides_an_outcome_changes_it(change: dict[str, Any]) -> None:
    assert replace(CONFIG, **change).run_id != CONFIG.run_id


def test_stages_on_two_cpus_leave_the_spare_free() -> None:
    stages = CONFIG.stages().values()
    assert sum(stage.actors * stage.num_cpus for stage in stages) + SPARE_CPUS <= 2
    assert sum(stage.actors * stage.num_gpus for stage in stages) == 0


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_stages_one_renderer_a_gpu_fit_that_many_gpus(gpus: int) -> None:
    stages = replace(CONFIG, engine=EngineSettings(device="cuda"), num_renderers=gpus).stages()
    assert stages["render"].num_gpus > 0.5
    assert sum(stage.actors * stage.num_gpus for stage in stages.values()) <= gpus
