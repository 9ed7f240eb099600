"""The cases that a generator is tested on: who is shown, what the prompt asks for, and in which reference photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echovideo.evaluation.networks import FRAMES
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import ATTRIBUTES, ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import SIDE, draw, draw_references, draw_tensors
from echovideo.synthetic.person import SPLITS, people

PEOPLE = SPLITS["test"][10_000:10_300]
"""The test people. The split's first were looked at while the drawing was tuned."""
FIRST_CLIP = 3_000_000_000
"""The first clip seed of the tests; no generator and no judge is trained on these clips."""
_REFERENCE_FRAMES = 3
_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One clip to generate: a test person's seed, the prompt, what it asks for, and what the reference photo shows.

    `condition` is all that the clip should show, `asked` the part of it that the prompt says. `reference` shows the
    same person under a condition of its own; the photo is the middle frame of its clip.
    """

    person: int
    prompt: str
    condition: ClipCondition
    asked: Mapping[str, str]
    reference: ClipCondition


def drawn_cases(*, clips_each: int = 1, seeds: range = PEOPLE) -> list[Case]:
    """Return `clips_each` cases of each person, one person after another; prompts say every attribute.

    Prompts are independent of the references, and both of the person.
    """
    count = clips_each * len(seeds)
    conditions = sample_conditions(range(FIRST_CLIP, FIRST_CLIP + count))
    references = sample_conditions(range(FIRST_CLIP + count, FIRST_CLIP + 2 * count))
    return [
        Case(
            person=seeds[number // clips_each],
            prompt=caption(condition, seed=condition.seed, omitted_share=0.0),
            condition=condition,
            asked=condition.attributes(),
            reference=reference,
        )
        for number, (condition, reference) in enumerate(zip(conditions, references, strict=True))
    ]


def draw_truths(cases: Sequence[Case], device: str = "cpu") -> Tensor:
    """Return each case as it should look: uint8 (B, FRAMES, SIDE, SIDE, 3) on the CPU."""
    clips = [
        draw(people([case.person for case in chunk]), [case.condition for case in chunk], frames=FRAMES, device=device)
        for chunk in _chunks(cases)
    ]
    return torch.cat([_as_bytes(drawing.frames_BFCHW) for drawing in clips])


def draw_reference_photos(cases: Sequence[Case], device: str = "cpu") -> Tensor:
    """Return each case's reference photo: uint8 (B, 1, SIDE, SIDE, 3) on the CPU."""
    photos = []
    for chunk in _chunks(cases):
        identity = torch.tensor([person.parameters for person in people([case.person for case in chunk])])
        scene = reference_scene(chunk)
        drawing = draw_tensors(identity.to(device), scene.to(device), SIDE, SIDE)
        photos.append(_as_bytes(drawing.frames_BFCHW))
    return torch.cat(photos)


def draw_gallery(seeds: Sequence[int], device: str = "cpu") -> Tensor:
    """Return one neutral picture of each person: uint8 (P, 1, SIDE, SIDE, 3) on the CPU."""
    parts = [people(seeds[start : start + _CHUNK]) for start in range(0, len(seeds), _CHUNK)]
    return torch.cat([_as_bytes(draw_references(part, device=device).frames_BFCHW) for part in parts])


def reference_scene(cases: Sequence[Case]) -> Tensor:
    """Return the scene tensor (B, 1, curves) of the cases' reference photos."""
    return scene_curves([case.reference for case in cases], _REFERENCE_FRAMES)[:, 1:2]


def asked_indices(cases: Sequence[Case]) -> Tensor:
    """Return the index of each asked value in ATTRIBUTES, int64 (B, len(ATTRIBUTES)); -1 where nothing is asked."""
    return torch.tensor(
        [
            [values.index(case.asked[name]) if name in case.asked else -1 for name, values in ATTRIBUTES.items()]
            for case in cases
        ]
    )


def _chunks(cases: Sequence[Case]) -> list[Sequence[Case]]:
    return [cases[start : start + _CHUNK] for start in range(0, len(cases), _CHUNK)]


def _as_bytes(frames_BFCHW: Tensor) -> Tensor:
    return (frames_BFCHW.permute(0, 1, 3, 4, 2) * 255).round().byte().cpu()
