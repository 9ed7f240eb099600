"""What a stage of training does, as one frozen record, and the three stages: base, one and two.

The paper (arXiv 2501.13452) says that stage 1 trains IITF, that stage 2 trains the whole model, and that the face
latent is dropped at random in stage 2. It states no number: every rate, probability and cadence here is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from echovideo.errors import TrainingError
from echovideo.model.config import Recompute

Group = Literal["fusion", "attention", "feed_forward", "norms", "patch_embed", "output"]
GROUPS: tuple[Group, ...] = get_args(Group)
BACKBONE: tuple[Group, ...] = tuple(group for group in GROUPS if group != "fusion")
ADAPTED_GROUPS: tuple[Group, ...] = ("attention", "feed_forward")

_FREE = frozenset(
    {"recomputed_blocks", "recompute", "record_every", "checkpoint_every", "keep_checkpoints", "validate_every"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """A low-rank adapter (LoRA): its rank, and the groups whose linear layers carry it.

    In "attention" these are all four; in "feed_forward" it is the second one, because the first is one operator
    with its GELU.
    """

    rank: int
    groups: tuple[Group, ...] = ("attention",)


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageSettings:
    """An exponential moving average of the trained weights, in float32.

    It lives beside the weights or in the CPU's memory, and takes one step of decay ** `every` each `every` steps.
    """

    decay: float
    device: Literal["model", "cpu"] = "model"
    every: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSettings:
    """One stage of training. Raises TrainingError for values that make none.

    `groups` are trained in full. `face_latent` says whether the reference's latents are given: "off" never, "on"
    always, "drop" dropped with probability `face_latent_dropout`. `condition_dropout` drops text and identity together,
    as guidance's unconditional half does; `text_dropout` and `identity_dropout` drop one of them. `references` says
    which faces a source gives: of the clip itself, or of another clip of the person. A cell that shows the face
    weighs 1 + `face_mask_weight` before weights are divided by their mean.

    `batch_size` counts the examples of all devices; `clip_norm` bounds the gradient's norm. The first
    `recomputed_blocks` blocks compute again in the backward pass what `recompute` names, which changes memory and time
    alone: norms, rotary embedding and GELU ("elementwise"), or linear layers too ("products"). `record_every` is the
    number of steps after which the loss is read from the device, `keep_checkpoints` the number of last checkpoints kept
    beside the best.
    """

    name: str
    steps: int
    batch_size: int
    groups: tuple[Group, ...]
    adapter: AdapterSettings | None = None
    face_latent: Literal["off", "drop", "on"] = "off"
    face_latent_dropout: float = 0.5
    text_dropout: float = 0.0
    identity_dropout: float = 0.0
    condition_dropout: float = 0.1
    references: Literal["in_clip", "cross_clip"] = "in_clip"
    face_mask_weight: float = 0.0
    learning_rate: float = 1e-5
    warmup_steps: int = 200
    schedule: Literal["constant", "cosine"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    average: AverageSettings | None = None
    seed: int = 0
    recomputed_blocks: int = 0
    recompute: Recompute = "products"
    record_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validate_every: int | None = None

    def __post_init__(self) -> None:
        groups = self.groups + (self.adapter.groups if self.adapter else ())
        checks = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "groups": groups and set(groups) <= set(GROUPS) and len(groups) == len(set(groups)),
            "face_latent": self.face_latent in ("off", "drop", "on"),
            **{
                name: 0 <= getattr(self, name) <= 1
                for name in ("face_latent_dropout", "text_dropout", "identity_dropout", "condition_dropout")
            },
            "references": self.references in ("in_clip", "cross_clip"),
            "face_mask_weight": 0 <= self.face_mask_weight < math.inf,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_steps": self.warmup_steps >= 0,
            "schedule": self.schedule in ("constant", "cosine"),
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "clip_norm": self.clip_norm > 0,
            "recomputed_blocks": self.recomputed_blocks >= 0,
            "recompute": self.recompute in get_args(Recompute),
            "record_every": self.record_every >= 1,
            "checkpoint_every": self.checkpoint_every >= 1,
            "keep_checkpoints": self.keep_checkpoints >= 1,
            "validate_every": self.validate_every is None or self.validate_every >= 1,
        }
        if self.adapter:
            checks["adapter"] = self.adapter.rank >= 1 and set(self.adapter.groups) <= set(ADAPTED_GROUPS)
        if self.average:
            checks["average"] = 0 < self.average.decay < 1 and self.average.every >= 1
            checks["average"] &= self.average.device in ("model", "cpu")
        for name, holds in checks.items():
            if not holds:
                raise TrainingError(f"training setting {name} = {getattr(self, name)!r} cannot be", code="settings")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, which counts from 0: warmed up, then constant or a half cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.learning_rate * warm
        progress = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * warm * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` gave; raises TrainingError for a key or value that makes none."""
        try:
            known = dict(values) | {name: tuple(values[name]) for name in ("groups", "betas") if name in values}
            if known.get("adapter"):
                adapter = dict(known["adapter"])
                known["adapter"] = AdapterSettings(**adapter | {"groups": tuple(adapter["groups"])})
            if known.get("average"):
                known["average"] = AverageSettings(**known["average"])
            return cls(**known)
        except (TypeError, KeyError, ValueError) as error:
            raise TrainingError(f"training settings cannot be read: {error}", code="settings") from None

    def numbers(self) -> dict[str, Any]:
        """Return what decides the numbers of a run, as JSON values: all but memory and cadences."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE}


def base(*, steps: int, batch_size: int, **changes: Any) -> StageSettings:
    """Return the text-to-video base's settings: IITF and the face latent out of the path, the backbone trained."""
    settings = StageSettings(
        name="base", steps=steps, batch_size=batch_size, groups=BACKBONE, identity_dropout=1.0, learning_rate=1e-4
    )
    return replace(settings, **changes)


def stage_one(*, steps: int, batch_size: int, **changes: Any) -> StageSettings:
    """Return stage 1's settings: the fusion layers learn to carry identity, without the face latent.

    Add the backbone's groups to train it too.
    """
    settings = StageSettings(
        name="stage_one", steps=steps, batch_size=batch_size, groups=("fusion",), learning_rate=1e-4
    )
    return replace(settings, **changes)


def stage_two(*, steps: int, batch_size: int, **changes: Any) -> StageSettings:
    """Return stage 2's settings: all is trained, with the face latent half of the time, and faces of other clips."""
    settings = StageSettings(
        name="stage_two",
        steps=steps,
        batch_size=batch_size,
        groups=GROUPS,
        face_latent="drop",
        references="cross_clip",
        learning_rate=1e-5,
    )
    return replace(settings, **changes)


def one_person(
    *,
    steps: int,
    batch_size: int,
    rank: int,
    learning_rate: float = 1e-4,
    validate_every: int | None = None,
    **changes: Any,
) -> StageSettings:
    """Return the settings that learn one person: stage 2 with low-rank layers in attention, and fusion in full.

    Unless said, validation comes after every quarter of the steps.
    """
    return stage_two(
        steps=steps,
        batch_size=batch_size,
        groups=("fusion",),
        adapter=AdapterSettings(rank=rank),
        learning_rate=learning_rate,
        warmup_steps=min(100, steps // 10),
        checkpoint_every=min(250, steps),
        validate_every=math.ceil(steps / 4) if validate_every is None else validate_every,
        **changes,
    )
