from __future__ import annotations

from pathlib import Path

import pytest

from echovideo.errors import RunError
from pipelines.resources import SPARE_CPUS, StageResources, check_disk, check_resources


def stage(name: str, actors: int, num_cpus: float, num_gpus: float = 0.0) -> StageResources:
    return StageResources(name=name, actors=actors, num_cpus=num_cpus, num_gpus=num_gpus)


FOUR = [stage(name, 1, 1.0) for name in ("digest", "identity", "condition", "render")]


def test_four_one_cpu_stages_on_two_cpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(RunError, match=r"needs 5 CPUs, the cluster has 2: digest 1 x \(1 CPUs") as caught:
        check_resources(FOUR, {"CPU": 2.0})
    assert caught.value.code == "too_few_resources"
    assert caught.value.numbers["cpu_needed"] == 4 + SPARE_CPUS
    assert caught.value.numbers["cpu_available"] == 2


def test_stages_without_the_spare_cpu_are_refused_and_with_it_pass() -> None:
    with pytest.raises(RunError):
        check_resources(FOUR, {"CPU": 4.0})
    check_resources(FOUR, {"CPU": 4.0 + SPARE_CPUS})


def test_fractional_cpus_that_sum_to_the_limit_pass() -> None:
    check_resources([stage(str(number), 1, 0.1) for number in range(10)], {"CPU": 2.0})


def test_each_lacking_resource_is_named() -> None:
    with pytest.raises(RunError, match="needs 5 CPUs, the cluster has 2, and needs 8 GPUs, the cluster has 4"):
        check_resources([stage("render", 8, 0.5, 1.0)], {"CPU": 2.0, "GPU": 4.0})


def test_disk_too_small_is_refused_for_a_folder_not_yet_made(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError, match="GiB is free") as caught:
        check_disk(tmp_path / "not" / "yet", 2**62)
    assert caught.value.code == "too_little_disk"
