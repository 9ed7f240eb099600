from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from echovideo.evaluation.ablation import (
    ArmSettings,
    World,
    ablation_arms,
    measurements_of,
    read_runs,
    rows,
    run_arm,
)
from echovideo.evaluation.cases import Case, drawn_cases
from echovideo.evaluation.claims import CLAIMS, Arm, Reading
from echovideo.evaluation.networks import FRAMES, AttributeJudge, IdentityJudge, Judges
from echovideo.evaluation.page import verdicts, write_page
from echovideo.synthetic.person import SPLITS
from echovideo.training.settings import stage_one, stage_two

STAGES = stage_one(steps=100, batch_size=4), stage_two(steps=100, batch_size=4)
SIDE = 32


@pytest.fixture(scope="module")
def arms() -> dict[str, ArmSettings]:
    return {settings.arm: settings for settings in ablation_arms(*STAGES)}


@pytest.fixture(scope="module")
def world() -> World:
    """A world of random pictures and untrained judges: what counts here is where the numbers go."""
    torch.manual_seed(0)

    def pictures(count: int, frames: int) -> Tensor:
        return torch.randint(0, 256, (count, frames, SIDE, SIDE, 3), dtype=torch.uint8)

    judges = Judges(attribute=AttributeJudge(), identity=IdentityJudge())
    return World(
        judges=judges,
        cases=drawn_cases(seeds=SPLITS["test"][:8]),
        truths_BFHWC=pictures(8, FRAMES),
        references_BFHWC=pictures(8, 1),
        gallery_BFHWC=pictures(8, 1),
        accept=None,
    )


def test_ablation_arms_differ_in_what_they_are_named_for(arms: dict[str, ArmSettings]) -> None:
    assert set(arms) == set(get_args(Arm))
    assert [stage.references for stage in arms["full"].stages] == ["cross_clip", "cross_clip"]
    assert [stage.references for stage in arms["in_clip"].stages] == ["in_clip", "in_clip"]
    assert {stage.face_latent for stage in arms["stage_one_only"].stages} == {"off"}
    assert [stage.face_latent for stage in arms["always_on"].stages] == ["on"]
    assert arms["without_iitf"].stages[0].identity_dropout == 1
    assert not arms["without_iitf"].identity


def test_ablation_arms_take_equal_steps_but_the_one_matched_in_exposure(arms: dict[str, ArmSettings]) -> None:
    assert {settings.steps for name, settings in arms.items() if name != "exposure_matched"} == {200}
    exposed, always = arms["exposure_matched"].stages[-1], arms["always_on"].stages[0]
    assert exposed.steps * (1 - exposed.face_latent_dropout) == always.steps


def test_strengths_are_those_that_claims_read(arms: dict[str, ArmSettings]) -> None:
    assert arms["full"].strengths == (0.0, 0.5, 1.0)
    assert arms["stage_one_only"].strengths == (0.0,)
    assert arms["always_on"].strengths == (0.0, 1.0)


def test_runs_written_one_by_one_give_rows_verdicts_and_a_page(
    arms: dict[str, ArmSettings], world: World, tmp_path: Path
) -> None:
    asked: list[tuple[Path, str, float]] = []

    def train(settings: ArmSettings, seed: int) -> Path:
        return tmp_path / "models" / f"{settings.arm}-{seed}"

    def generate(model: Path, settings: ArmSettings, cases: Sequence[Case], strength: float) -> Tensor:
        asked.append((model, settings.arm, strength))
        return torch.full((len(cases), FRAMES, SIDE, SIDE, 3), int(100 * strength), dtype=torch.uint8)

    out = tmp_path / "runs"
    ceiling = world.look(world.truths_BFHWC)
    for seed, names in ((0, tuple(arms)), (1, ("full", "without_iitf"))):
        for name in names:
            run_arm(arms[name], seed, train, generate, world, ceiling, out)
    (out / "full-2").mkdir()
    assert asked[:3] == [(tmp_path / "models" / "full-0", "full", strength) for strength in (0.0, 0.5, 1.0)]

    runs = read_runs(out)
    assert {(run.arm, run.seed) for run in runs} == {(name, 0) for name in arms} | {("full", 1), ("without_iitf", 1)}
    found = measurements_of(runs, 0)
    ssim = found[Reading(arm="full", score="ssim_to_reference")]
    assert len(ssim.resampled) == 1000
    # One reading a score and strength, and its ceiling from the truths.
    assert found[Reading(arm="full", score="rank_1")].ceiling == np.mean(
        np.argmax(ceiling.embedding @ ceiling.gallery.T, axis=1) == np.arange(8)
    )
    assert len(rows(runs)) == sum(len(run.measurements) for run in runs)

    assert all(verdict is not None for verdict in verdicts(found).values())
    # The second seed ran two arms: the claims that need no other are judged, the rest wait.
    judged = verdicts(measurements_of(runs, 1))
    assert {name for name, verdict in judged.items() if verdict} == {"P1", "P2"}

    write_page(runs, people=8, path=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(claim.statement in page.replace("&#39;", "'") for claim in CLAIMS)
    assert page.count("not run") == 4
    assert page.count("<svg") == 4
    assert page.count('alt="three frames"') == 6 * len(arms)


def test_run_arm_acceptance_is_scored_where_the_recogniser_is_given(
    arms: dict[str, ArmSettings], world: World, tmp_path: Path
) -> None:
    half = replace(world, accept=lambda clips: np.arange(len(clips)) % 2.0)
    clips = world.truths_BFHWC
    run_arm(arms["stage_one_only"], 0, lambda *_: tmp_path, lambda *_: clips, half, half.look(clips), tmp_path / "runs")
    (run,) = read_runs(tmp_path / "runs")
    assert run.measurements[Reading(arm="stage_one_only", score="accepted", face_latent=0.0)].value == 0.5
