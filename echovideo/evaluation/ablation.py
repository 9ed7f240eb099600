"""The ablation's arms, how each is scored, and the results of all that were run so far.

An arm and a training seed are one run, kept in a folder of its own, so that arms can be trained one after another or on
several machines; `results` puts together what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echovideo.evaluation.cases import Case
from echovideo.evaluation.claims import Arm, Measured, Reading, readings
from echovideo.evaluation.scores import SCORES, Evidence, Expected, score, share_of_ceiling
from echovideo.results import Row
from echovideo.training.settings import BACKBONE, StageSettings

EXAMPLES = 6
"""How many of a run's first clips are kept for the page, three frames each."""
_MOMENTS = (0, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmSettings:
    """One way of training on from the text-to-video base.

    `face_latent` is the strength it is sampled at unless a claim asks for others. `identity` is False where the fusion
    was never trained: the clips are then made with no identity, as in training.
    """

    arm: Arm
    meaning: str
    stages: tuple[StageSettings, ...]
    face_latent: float = 1.0
    identity: bool = True

    @property
    def steps(self) -> int:
        """Training steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the face latent that it is sampled at: its own and those that the claims read."""
        asked = {reading.face_latent for reading in readings() if reading.arm == self.arm}
        return tuple(sorted(asked | {self.face_latent}))


Train = Callable[[ArmSettings, int], Path]
"""Trains an arm with a seed and returns its model folder."""
Generate = Callable[[Path, ArmSettings, Sequence[Case], float], Tensor]
"""Makes a clip of each case with a model folder at a strength of the face latent: uint8 (B, 17, 96, 96, 3)."""


def ablation_arms(one: StageSettings, two: StageSettings) -> tuple[ArmSettings, ...]:
    """Return the arms, given the two stages of the full method.

    Each takes as many steps as both stages together, except the one that takes more of stage 2 on purpose.
    """
    assert two.face_latent == "drop"
    steps = one.steps + two.steps
    one, two = (replace(stage, references="cross_clip") for stage in (one, two))
    single = replace(two, steps=steps)
    # The arm that always gives the face latent gives it at every step.
    matched = replace(two, steps=round(steps / (1 - two.face_latent_dropout)))
    return (
        ArmSettings(arm="full", meaning="stage 1, then stage 2", stages=(one, two)),
        ArmSettings(
            arm="stage_one_only",
            meaning="stage 1 for all steps; the face latent is never given",
            stages=(replace(one, steps=steps),),
            face_latent=0.0,
        ),
        ArmSettings(
            arm="always_on",
            meaning="one stage, the face latent always given",
            stages=(replace(single, face_latent="on"),),
        ),
        ArmSettings(
            arm="without_iitf",
            meaning="one stage without identity in the text path: the face latent alone, dropped at random",
            stages=(replace(single, identity_dropout=1.0, groups=BACKBONE),),
            identity=False,
        ),
        ArmSettings(
            arm="in_clip",
            meaning="both stages, references cut from the clip itself",
            stages=tuple(replace(stage, references="in_clip") for stage in (one, two)),
        ),
        ArmSettings(
            arm="always_on_in_clip",
            meaning="one stage, the face latent always given and cut from the clip itself",
            stages=(replace(single, face_latent="on", references="in_clip"),),
        ),
        ArmSettings(arm="single_stage", meaning="one stage, the face latent dropped at random", stages=(single,)),
        ArmSettings(
            arm="exposure_matched",
            meaning="stage 1, then stage 2 until it has seen the face latent as often as always_on: more steps",
            stages=(one, matched),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """One arm trained with one seed: its measurements, and example frames uint8 (EXAMPLES, 3, H, W, 3) by strength.

    `references` uint8 (EXAMPLES, H, W, 3) and `prompts` are the examples' own.
    """

    arm: Arm
    seed: int
    meaning: str
    steps: int
    measurements: Mapping[Reading, Measured]
    examples: Mapping[float, NDArray[np.uint8]]
    references: NDArray[np.uint8]
    prompts: tuple[str, ...]


def run_arm(
    settings: ArmSettings,
    seed: int,
    train: Train,
    generate: Generate,
    see: Callable[[Tensor], Evidence],
    expected: Expected,
    ceiling: Evidence,
    out: Path,
) -> Path:
    """Train and score one arm with one seed, and write the run into a folder of `out`, whose path is returned.

    `see` looks at clips of the expected cases; `ceiling` is what it saw in the drawn truths after the generators'
    autoencoder.
    """
    model = train(settings, seed)
    arrays: dict[str, NDArray[Any]] = {"references": expected.references_BHWC[:EXAMPLES].numpy()}
    for strength in settings.strengths:
        clips = generate(model, settings, expected.cases, strength)
        for name, measured in score(see(clips), ceiling).items():
            arrays[f"{strength}/resampled/{name}"] = measured.resampled
            arrays[f"{strength}/value/{name}"] = np.array([measured.value, _number(measured.ceiling)])
        arrays[f"{strength}/examples"] = clips[:EXAMPLES, list(_MOMENTS)].numpy()
    folder = out / f"{settings.arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "scores.npz", **arrays)  # type: ignore[arg-type]
    record = asdict(settings) | {
        "stages": [stage.to_dict() for stage in settings.stages],
        "seed": seed,
        "steps": settings.steps,
        "strengths": settings.strengths,
        "prompts": [case.prompt for case in expected.cases[:EXAMPLES]],
        "torch": torch.__version__,
    }
    # Last, so that a folder with it is whole.
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def read_runs(out: Path) -> list[Run]:
    """Return the whole runs of a folder, by arm and seed; one that was cut off has no run.json and is left out."""
    runs = []
    for path in sorted(out.glob("*/run.json")):
        record = json.loads(path.read_text())
        with np.load(path.parent / "scores.npz") as arrays:
            measurements = {}
            for strength in record["strengths"]:
                for name in SCORES:
                    if f"{strength}/value/{name}" not in arrays:
                        continue
                    value, ceiling = arrays[f"{strength}/value/{name}"].tolist()
                    measurements[Reading(arm=record["arm"], score=name, face_latent=strength)] = Measured(
                        value=value,
                        resampled=arrays[f"{strength}/resampled/{name}"],
                        ceiling=None if np.isnan(ceiling) else ceiling,
                    )
            runs.append(
                Run(
                    arm=record["arm"],
                    seed=record["seed"],
                    meaning=record["meaning"],
                    steps=record["steps"],
                    measurements=measurements,
                    examples={strength: arrays[f"{strength}/examples"] for strength in record["strengths"]},
                    references=arrays["references"],
                    prompts=tuple(record["prompts"]),
                )
            )
    return runs


def measurements_of(runs: Sequence[Run], seed: int) -> dict[Reading, Measured]:
    """Return all readings of one training seed."""
    return {reading: measured for run in runs if run.seed == seed for reading, measured in run.measurements.items()}


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for every score of every run, with its interval, ceiling and share of it."""
    found = []
    for run in runs:
        for reading, measured in run.measurements.items():
            low, high = measured.interval()
            share = share_of_ceiling(reading.score, measured)
            found.append(
                Row(
                    name=f"{run.arm}, seed {run.seed}, face latent {reading.face_latent:g}",
                    metric=reading.score,
                    value=measured.value,
                    unit=SCORES[reading.score].unit,
                    against={"low": low, "high": high}
                    | ({} if measured.ceiling is None else {"ceiling": measured.ceiling})
                    | ({} if share is None else {"share of ceiling": share}),
                )
            )
    return found


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
