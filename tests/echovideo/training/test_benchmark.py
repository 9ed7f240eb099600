"""The step's benchmark at the size of a test, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from echovideo.errors import TrainingError
from echovideo.results import write_results
from echovideo.training import benchmark
from echovideo.training.batch import TrainingBatch
from echovideo.training.benchmark import (
    DIFFUSERS,
    FULL_SIZE,
    Case,
    measure_ours,
    rows_of_many,
    rows_of_one,
    stages,
    step_flops,
)
from echovideo.training.loop import Trainer
from tests.echovideo.training.small import CONFIG

SMALL = Case(config=CONFIG, frames=2, height=4, width=6, device="cpu", dtype=torch.float32)


def test_rows_of_one_have_every_stage_and_diffusers_beside_the_full_one(tmp_path: Path) -> None:
    rows = list(rows_of_one(SMALL))
    path = write_results("step", rows, tmp_path, machine="a CPU", commit="0123")
    found = json.loads(path.read_text())
    assert (found["benchmark"], found["commit"], found["machine"]) == ("step", "0123", "a CPU")
    assert [row["name"].split(", 0 of")[0] for row in found["rows"][::3]] == list(stages(1))
    assert [row["metric"] for row in found["rows"][:3]] == ["time of a step", "model-FLOP utilisation", "peak memory"]
    assert [row["floor"] for row in found["rows"]] == [2.9, 0.44, None, *[None] * 9]
    seconds, utilisation = found["rows"][:2]
    assert seconds["against"][DIFFUSERS] > 0
    flops = step_flops(SMALL, backbone_trained=True)
    assert utilisation["value"] == pytest.approx(flops / seconds["value"] / 989e12)
    assert utilisation["against"][DIFFUSERS] == pytest.approx(flops / seconds["against"][DIFFUSERS] / 989e12)


def test_rows_of_two_processes_give_the_scaling() -> None:
    seconds, _, _, scaling = rows_of_many(SMALL, 2)
    assert scaling.value == pytest.approx(2 * float(seconds.against["one GPU"]) / seconds.value)
    assert scaling.floor == 1.9


def test_step_flops_are_those_that_torch_counts() -> None:
    """Half as many heads' worth of difference would show; what is left out of the count is small at this size."""
    config = replace(CONFIG, num_attention_heads=8, attention_head_dim=64, num_layers=2, time_embed_dim=8)
    case = replace(SMALL, config=config, frames=4, height=24, width=24)
    with torch.device("meta"):
        model = benchmark.EchoVideoTransformer3DModel(config)
        num_video, num_text = case.tokens
        with FlopCounterMode(display=False) as counter:
            model.denoise(
                torch.empty(1, 4, 32, 24, 24),
                torch.empty(1, num_text, config.text_embed_dim),
                torch.zeros(1, dtype=torch.long),
                (torch.empty(num_video, 64), torch.empty(num_video, 64)),
            )
    ours = step_flops(case, backbone_trained=True) / 3
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


def test_step_flops_of_the_published_size() -> None:
    assert step_flops(FULL_SIZE, backbone_trained=True) == pytest.approx(1.27e15, rel=0.02)


@pytest.mark.parametrize(("memory", "fewest"), [(1000.0, 0), (60.0, 21), (30.0, 35), (15.0, 40)])
def test_fewest_blocks_leave_a_twentieth_of_the_memory_free(memory: float, fewest: int) -> None:
    assert benchmark._fewest_blocks(lambda recomputed: 18.0 + 2.0 * (40 - recomputed), 40, memory) == fewest


def test_measure_that_does_not_fit_recomputes_more_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, num_layers=4)
    tried: list[int] = []
    take = Trainer.take

    def take_if_it_fits(trainer: Trainer, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        tried.append(trainer.model.recomputed_blocks)
        if trainer.model.recomputed_blocks < 3:
            raise TrainingError("too large", code="out_of_memory")
        return take(trainer, batch)

    monkeypatch.setattr(Trainer, "take", take_if_it_fits)
    found = measure_ours(replace(SMALL, config=config), stages(1)["stage 2, full"])
    assert list(dict.fromkeys(tried)) == [0, 2, 4]
    assert found.recomputed_blocks == 4
