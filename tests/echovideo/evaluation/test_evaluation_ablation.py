from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from echovideo.evaluation.ablation import (
    ArmSettings,
    ablation_arms,
    measurements_of,
    read_runs,
    rows,
    run_arm,
)
from echovideo.evaluation.cases import Case, asked_indices, drawn_cases, reference_scene
from echovideo.evaluation.claims import CLAIMS, Arm, Reading
from echovideo.evaluation.networks import FRAMES, mole_map, nuisances, traits
from echovideo.evaluation.page import verdicts, write_page
from echovideo.evaluation.scores import Evidence, Expected, asked_nuisances
from echovideo.evaluation.statistics import Numbers
from echovideo.synthetic.person import SPLITS, identity_parameters
from echovideo.training.settings import stage_one, stage_two

STAGES = stage_one(steps=100, batch_size=4), stage_two(steps=100, batch_size=4)
SIDE = 8


@pytest.fixture(scope="module")
def arms() -> dict[str, ArmSettings]:
    return {settings.arm: settings for settings in ablation_arms(*STAGES)}


@pytest.fixture(scope="module")
def expected() -> Expected:
    """Eight people of random embeddings: what counts here is where the numbers go."""
    random = np.random.default_rng(0)
    return Expected(
        cases=drawn_cases(seeds=SPLITS["test"][:8]),
        references_BHWC=torch.zeros(8, SIDE, SIDE, 3, dtype=torch.uint8),
        gallery=random.normal(size=(8, 16)),
        truth_embedding=random.normal(size=(8, 16)),
        reference_embedding=random.normal(size=(8, 16)),
    )


def seen(expected: Expected, clips: Tensor, accepted: Numbers | None = None) -> Evidence:
    """What perfect judges would see, but for the flicker, which is the clips' first byte."""
    identity = identity_parameters(torch.tensor([case.person for case in expected.cases]))
    true_traits, true_moles = traits(identity).double().numpy(), mole_map(identity).double().numpy()
    asked, implied = asked_indices(expected.cases).numpy(), asked_nuisances(expected.cases)
    return Evidence(
        person=np.arange(8),
        gallery=expected.gallery,
        embedding=expected.gallery,
        truth_embedding=expected.truth_embedding,
        reference_embedding=expected.reference_embedding,
        traits=true_traits,
        true_traits=true_traits,
        visible=np.ones(true_traits.shape[1], dtype=bool),
        read=asked,
        asked=asked,
        referenced=(asked + 1) % 3,
        nuisances=implied,
        asked_nuisances=implied,
        referenced_nuisances=nuisances(reference_scene(expected.cases)).double().numpy(),
        nuisance_scale=np.ones(implied.shape[1]),
        moles=true_moles,
        true_moles=true_moles,
        ssim_to_reference=np.zeros(8),
        flicker=clips[:, 0, 0, 0, 0].double().numpy(),
        accepted=accepted,
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
    arms: dict[str, ArmSettings], expected: Expected, tmp_path: Path
) -> None:
    asked: list[tuple[Path, str, float]] = []

    def train(settings: ArmSettings, seed: int) -> Path:
        return tmp_path / "models" / f"{settings.arm}-{seed}"

    def generate(model: Path, settings: ArmSettings, cases: Sequence[Case], strength: float) -> Tensor:
        asked.append((model, settings.arm, strength))
        return torch.full((len(cases), FRAMES, SIDE, SIDE, 3), int(100 * strength), dtype=torch.uint8)

    out = tmp_path / "runs"
    ceiling = seen(expected, torch.full((8, 1, 1, 1, 1), 7))
    for seed, names in ((0, tuple(arms)), (1, ("full", "without_iitf"))):
        for name in names:
            run_arm(arms[name], seed, train, generate, partial(seen, expected), expected, ceiling, out)
    (out / "full-2").mkdir()
    assert asked[:3] == [(tmp_path / "models" / "full-0", "full", strength) for strength in (0.0, 0.5, 1.0)]

    runs = read_runs(out)
    assert {(run.arm, run.seed) for run in runs} == {(name, 0) for name in arms} | {("full", 1), ("without_iitf", 1)}
    found = measurements_of(runs, 0)
    # Each reading is of the clips made at its own strength, and its ceiling of the truths.
    for strength in (0.0, 0.5, 1.0):
        flicker = found[Reading(arm="full", score="flicker", face_latent=strength)]
        assert (flicker.value, flicker.ceiling) == (100 * strength, 7)
        np.testing.assert_allclose(flicker.resampled, 100 * strength)
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
    arms: dict[str, ArmSettings], expected: Expected, tmp_path: Path
) -> None:
    clips = torch.zeros(8, FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    see = partial(seen, expected, accepted=np.arange(8) % 2.0)
    settings = arms["stage_one_only"]
    run_arm(settings, 0, lambda *_: tmp_path, lambda *_: clips, see, expected, see(clips), tmp_path / "runs")
    (run,) = read_runs(tmp_path / "runs")
    assert run.measurements[Reading(arm="stage_one_only", score="accepted", face_latent=0.0)].value == 0.5
