from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from echovideo.errors import TrainingError
from echovideo.evaluation.ablation import read_runs
from echovideo.evaluation.cases import drawn_cases
from echovideo.evaluation.claims import Arm
from echovideo.evaluation.networks import AttributeJudge, IdentityJudge, Judges
from echovideo.faces.recogniser import load_recogniser
from echovideo.synthetic.person import SPLITS
from echovideo.tiny import ablate, diffusion, scoring
from echovideo.tiny.ablate import Bench, Plan, arms_of, pack, prepare, unpack, write_findings
from echovideo.tiny.diffusion import Course, ModelSettings
from echovideo.tiny.generate import generate
from echovideo.tiny.scoring import Exam
from echovideo.tiny.world import Encoders, World
from echovideo.training.batch import NullCondition

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def plan(folder: Path, world: World) -> Plan:
    """A plan of two steps on a world of noise, with its base."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ablate, "draw_world", lambda *_: world)
        patched.setattr(ablate, "ModelSettings", partial(ModelSettings, batch_size=2))
        patched.setattr(diffusion, "_PACE_STEPS", 3)
        return prepare(folder, minutes=1e-6, people=8, recogniser=None, device=CPU)


def test_prepare_again_keeps_plan_and_world_and_refuses_other_encoders(folder: Path, plan: Plan) -> None:
    assert (plan.steps, plan.base_steps, plan.people, plan.batch_size) == (2, 1, 8, 2)
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert prepare(folder, minutes=9, people=3, recogniser=None, device=CPU) == plan
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == made
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace(plan.encoders, "other"))
    with pytest.raises(TrainingError, match="other encoders"):
        prepare(folder, minutes=9, people=3, recogniser=None, device=CPU)
    (folder / "plan.json").write_text(text)


def test_arms_of_a_plan_take_its_steps_the_longest_first(plan: Plan) -> None:
    arms = arms_of(plan)
    assert next(iter(arms)) == "exposure_matched"
    assert {arm.steps for name, arm in arms.items() if name != "exposure_matched"} == {plan.steps}


def test_arms_that_begin_with_the_same_stage_train_it_once_and_to_the_same_end(
    folder: Path, plan: Plan, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    null = NullCondition(text_1ND=world.text_NCTD[:1, 0], face_tokens_1ND=world.tokens_NPTD[:1, 0])

    def train(folder: Path, arm: Arm) -> tuple[bytes, list[str]]:
        bench = Bench(folder=folder, plan=plan, course=Course(world, null, 0.7), exam=None, device=CPU)  # type: ignore[arg-type]
        model = bench._train(arms_of(plan)[arm], 1)
        told = capsys.readouterr().out.splitlines()
        return (model / "transformer.safetensors").read_bytes(), [line.partition(":")[0] for line in told]

    alone, stages = train(folder, "full")
    assert stages == ["stage_one", "stage_two"]
    shutil.copy(folder / "transformer.safetensors", tmp_path)
    assert train(tmp_path, "exposure_matched")[1] == ["stage_one", "stage_two"]
    assert train(tmp_path, "full") == (alone, ["stage_two"])


def test_arm_trained_scored_packed_and_unpacked_is_the_same_run(
    folder: Path, plan: Plan, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "generate", partial(generate, steps=1))
    torch.manual_seed(0)
    judges = Judges(attribute=AttributeJudge().eval(), identity=IdentityJudge().eval())
    judges.identity.visible.fill_(1)
    encoders = Encoders.shipped(load_recogniser(), CPU)
    bench = Bench(
        folder=folder,
        plan=plan,
        course=Course(World(**torch.load(folder / "world.pt")), encoders.null(), encoders.scaling_factor),
        exam=Exam.of(encoders, judges, drawn_cases(seeds=SPLITS["test"][:2]), CPU),
        device=CPU,
    )
    bench.run(1, "stage_one_only")
    assert {path.name for path in (folder / "models" / "stage_one_only-1").iterdir()} == {"transformer.safetensors"}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    unpack([pack(folder, 1)], elsewhere)
    (run,), (again,) = read_runs(folder / "runs"), read_runs(elsewhere / "runs")
    assert (again.arm, again.seed, again.steps) == ("stage_one_only", 1, plan.steps)
    for reading, measured in run.measurements.items():
        assert measured.value == pytest.approx(again.measurements[reading].value, nan_ok=True)

    write_findings(elsewhere, "abc")
    assert '"commit": "abc"' in (elsewhere / "ablation.json").read_text()
    assert "stage 1 for all steps" in (elsewhere / "ablation.html").read_text()

    (elsewhere / "plan.json").write_text((folder / "plan.json").read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(TrainingError, match="another plan"):
        unpack([folder / "runs-1.zip"], elsewhere)
    with pytest.raises(TrainingError, match=r"plan.json is no pack of runs"):
        unpack([elsewhere / "plan.json"], elsewhere)
