"""The training loop: steps over a source of examples, with records and validation at their cadence."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from echovideo.errors import DatasetError, TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.batch import ExampleSource, NullCondition, TrainingBatch
from echovideo.training.groups import freeze_all_but
from echovideo.training.objective import NoiseSchedule, training_loss
from echovideo.training.optimizer import MasterAdamW
from echovideo.training.parallel import prepare, process
from echovideo.training.settings import StageSettings

BAD_STEPS_IN_A_ROW = 3
_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What a step left to be read: means over all processes.

    `step` counts from 0. A step is `skipped` when its loss or its gradient was not finite; then no weight moved.
    `gradient_norm` is taken before clipping. `numbers` are those that the objective gives beside its loss.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRecord:
    """What validation found after `steps` steps; "score", the higher the better, decides which weights are the best."""

    steps: int
    scores: Mapping[str, float]


Record = Callable[[StepRecord | ScoreRecord], None]
Validate = Callable[[EchoVideoTransformer3DModel, int], Mapping[str, float]]


class Trainer:
    """A model with its objective and optimizer, taken one step at a time; it never waits for the device.

    The model lies on the device, in bfloat16 or float32. Only the parameters of the settings' groups are trained.
    """

    def __init__(
        self,
        model: EchoVideoTransformer3DModel,
        schedule: NoiseSchedule,
        null: NullCondition,
        settings: StageSettings,
        *,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.settings = settings
        self._schedule = schedule
        self._null = null
        freeze_all_but(model, settings.groups)
        prepare(model, settings, compiled=compiled)
        self.optimizer = MasterAdamW(model.named_parameters(), settings)
        self.steps = 0
        """Steps taken, those left out included."""

    def take(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Take a step on this process's slice of the batch and return its numbers, still on the device.

        Raises TrainingError when the device's memory does not suffice.
        """
        try:
            loss, numbers = training_loss(self.model, self._schedule, batch, self._null, self.settings)
            loss.backward()
            losses, norm, bad = self.optimizer.step(self.steps, torch.stack([loss.detach(), *numbers.values()]))
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.steps} does not fit the device's memory with {len(batch.seed_B)} examples a process and "
                f"{self.settings.recomputed_blocks} of {len(self.model.transformer_blocks)} blocks recomputed: "
                f"recompute more, lower batch_size, or use more devices ({str(error).splitlines()[0]})",
                code="out_of_memory",
            ) from error
        self.steps += 1
        return {"gradient_norm": norm, "skipped": bad} | dict(zip(("loss", *numbers), losses.unbind(), strict=True))


def train(
    model: EchoVideoTransformer3DModel,
    schedule: NoiseSchedule,
    source: ExampleSource,
    null: NullCondition,
    settings: StageSettings,
    *,
    compiled: bool = False,
    record: Record | None = None,
    validate: Validate | None = None,
) -> int:
    """Train the model in place for the settings' steps, and return how many of them were skipped.

    The model lies on the device, in bfloat16 or float32, and so do `schedule`, `null` and the source's batches. Every
    process of torch.distributed's default group calls this. With `compiled`, torch.compile makes each block.

    `record` gets every step's numbers, some steps late, and the scores. `validate` renders and scores the model after
    so many steps, lent the averaged weights. Both are called by the first process only. Progress goes to stderr.
    Raises TrainingError when three steps in a row give no finite loss or gradient, or when memory runs out.
    """
    trainer = Trainer(model, schedule, null, settings, compiled=compiled)
    reader = _Reader(settings, record)
    rank, world_size = process()
    if settings.batch_size % world_size:
        raise TrainingError(
            f"batch_size {settings.batch_size} cannot be shared out evenly to {world_size} processes", code="settings"
        )
    while trainer.steps < settings.steps:
        batch = source.batch(trainer.steps, rank, world_size)
        if len(batch.seed_B) * world_size != settings.batch_size:
            raise DatasetError(f"the source gave {len(batch.seed_B)} examples of {settings.batch_size} / {world_size}")
        reader.keep(trainer.steps, trainer.take(batch))
        done = trainer.steps
        validates = validate is not None and _due(done, settings.validate_every, settings.steps)
        if validates or _due(done, settings.record_every, settings.steps):
            reader.read()
        if validate and validates:
            with trainer.optimizer.averaged():
                reader.tell(ScoreRecord(steps=done, scores=validate(model, done)))
    return reader.skipped


class _Reader:
    """Keeps the steps' numbers on the device until they are read together, for each reading waits for the device."""

    def __init__(self, settings: StageSettings, record: Record | None) -> None:
        self.skipped = 0
        self._in_a_row = 0
        self._settings = settings
        self._record = record
        self._kept: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._began = self._told = time.monotonic()
        self._read_steps = 0

    def keep(self, step: int, numbers: dict[str, torch.Tensor]) -> None:
        """Keep a step's numbers."""
        self._kept.append((step, numbers))

    def read(self) -> None:
        """Read what is kept and record it; raises TrainingError at the third bad step in a row."""
        if not self._kept:
            return
        table = torch.stack([torch.stack(list(numbers.values())) for _, numbers in self._kept]).tolist()
        for (step, numbers), values in zip(self._kept, table, strict=True):
            named = dict(zip(numbers, values, strict=True))
            bad = bool(named.pop("skipped"))
            self.skipped += bad
            self._in_a_row = self._in_a_row + 1 if bad else 0
            found = StepRecord(
                step=step,
                loss=named.pop("loss"),
                gradient_norm=named.pop("gradient_norm"),
                learning_rate=self._settings.rate(step),
                skipped=bad,
                numbers=named,
            )
            self.tell(found)
            if self._in_a_row == BAD_STEPS_IN_A_ROW:
                raise TrainingError(
                    f"steps {step - BAD_STEPS_IN_A_ROW + 1} to {step} gave no finite loss or gradient (loss "
                    f"{found.loss}, gradient norm {found.gradient_norm}): lower the learning rate, or look for the "
                    "examples of these steps",
                    code="not_finite",
                )
        self._read_steps += len(self._kept)
        self._kept.clear()
        self._report(found)

    def tell(self, found: StepRecord | ScoreRecord) -> None:
        """Hand a record on, from the first process alone."""
        if self._record and process()[0] == 0:
            self._record(found)

    def _report(self, found: StepRecord) -> None:
        now = time.monotonic()
        if now - self._told < _PROGRESS_SECONDS or process()[0]:
            return
        self._told = now
        each = (now - self._began) / self._read_steps
        left = each * (self._settings.steps - found.step - 1)
        print(
            f"{self._settings.name}: step {found.step + 1} of {self._settings.steps}, loss {found.loss:.4f}, "
            f"{each:.2f} s a step, {left / 60:.0f} min left, {self.skipped} skipped",
            file=sys.stderr,
            flush=True,
        )


def _due(done: int, every: int | None, steps: int) -> bool:
    return every is not None and (done % every == 0 or done == steps)
