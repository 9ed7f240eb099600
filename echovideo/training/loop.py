"""The training loop: steps over a source of examples, with records, checkpoints and validation at their cadence."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from echovideo.errors import DatasetError, TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.adapters import add_adapter
from echovideo.training.batch import ExampleSource, NullCondition, TrainingBatch
from echovideo.training.checkpoint import Checkpoints, Progress
from echovideo.training.graphed import GraphedGradients
from echovideo.training.groups import freeze_all_but
from echovideo.training.objective import NoiseSchedule, training_loss
from echovideo.training.optimizer import MasterAdamW
from echovideo.training.parallel import gathered, prepare, process
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

    def __post_init__(self) -> None:
        if "score" not in self.scores:
            raise TrainingError(f'validation gave no "score" among {", ".join(self.scores) or "no numbers"}')


Record = Callable[[StepRecord | ScoreRecord], None]
Validate = Callable[[EchoVideoTransformer3DModel, int], Mapping[str, float]]


class Trainer:
    """A model with its objective and optimizer, taken one step at a time; it never waits for the device.

    The model lies on the device, in bfloat16 or float32. Only the parameters of the settings' groups are trained, and
    the layers of its adapter, which are added to the model.
    """

    def __init__(
        self,
        model: EchoVideoTransformer3DModel,
        schedule: NoiseSchedule,
        null: NullCondition,
        settings: StageSettings,
        *,
        graphed: bool = False,
    ) -> None:
        self.model = model
        self.settings = settings
        self._schedule = schedule
        self._null = null
        freeze_all_but(model, settings.groups)
        if settings.adapter:
            add_adapter(model, settings.adapter, settings.seed)
        prepare(model, settings)
        self.optimizer = MasterAdamW(model.named_parameters(), settings)
        self._backward: Callable[..., torch.Tensor] | None = None if graphed else self._launched
        self._number_names: tuple[str, ...] = ()
        self.steps = 0
        """Steps taken, those left out included."""

    def take(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Take a step on this process's slice of the batch and return its numbers, still on the device.

        Raises TrainingError when the device's memory does not suffice.
        """
        try:
            tensors = [getattr(batch, field.name) for field in fields(batch)]
            if self._backward is None:
                self._backward = GraphedGradients(self._launched, list(self.optimizer.parameters.values()), tensors)
            losses, norm, bad = self.optimizer.step(self.steps, self._backward(*tensors))
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.steps} does not fit the device's memory with {len(batch.seed_B)} examples a process and "
                f"{self.settings.recomputed_blocks} of {len(self.model.transformer_blocks)} blocks recomputed: "
                f"recompute more, lower batch_size, or use more devices ({str(error).splitlines()[0]})",
                code="out_of_memory",
            ) from error
        self.steps += 1
        names = ("loss", *self._number_names)
        return {"gradient_norm": norm, "skipped": bad} | dict(zip(names, losses.unbind(), strict=True))

    def _launched(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Leave the gradients of a batch's tensors in the parameters; return the loss and the numbers beside it."""
        names = (field.name for field in fields(TrainingBatch))
        batch = TrainingBatch(**dict(zip(names, tensors, strict=True)))
        loss, numbers = training_loss(self.model, self._schedule, batch, self._null, self.settings)
        loss.backward()
        self._number_names = tuple(numbers)
        return torch.stack([loss.detach(), *numbers.values()])


def train(
    model: EchoVideoTransformer3DModel,
    schedule: NoiseSchedule,
    source: ExampleSource,
    null: NullCondition,
    settings: StageSettings,
    *,
    graphed: bool = False,
    checkpoints: Checkpoints | None = None,
    record: Record | None = None,
    validate: Validate | None = None,
) -> Progress:
    """Train the model in place up to the settings' steps, from the last of its checkpoints on, and return how it went.

    The model is left with the averaged weights, where the settings ask for an average.

    The model lies on the device, in bfloat16 or float32, and so do `schedule`, `null` and the source's batches. Every
    process of torch.distributed's default group calls this.

    `record` gets every step's numbers, some steps late, and the scores. `validate` renders and scores the model after
    so many steps, lent the averaged weights. Both are called by the first process only. Progress goes to stderr.
    With `graphed` loss and gradients are launched as one CUDA graph: for a small model, whose launches take longer than
    its work, on one GPU, with batches of one shape.
    Raises TrainingError when three steps in a row give no finite loss or gradient, or when memory runs out;
    StorageError when a checkpoint cannot be written.
    """
    trainer = Trainer(model, schedule, null, settings, graphed=graphed)
    progress = checkpoints.restore(trainer.optimizer) if checkpoints else Progress()
    trainer.steps = progress.steps
    reader = _Reader(settings, progress, record)
    rank, world_size = process()
    if settings.batch_size % world_size:
        raise TrainingError(
            f"batch_size {settings.batch_size} cannot be shared out evenly to {world_size} processes", code="settings"
        )
    try:
        while trainer.steps < settings.steps:
            batch = source.batch(trainer.steps, rank, world_size)
            if len(batch.seed_B) * world_size != settings.batch_size:
                raise DatasetError(
                    f"the source gave {len(batch.seed_B)} examples of {settings.batch_size} / {world_size}"
                )
            reader.keep(trainer.steps, trainer.take(batch))
            done = trainer.steps
            validates = validate is not None and _due(done, settings.validate_every, settings.steps)
            saves = checkpoints is not None and (validates or _due(done, settings.checkpoint_every, settings.steps))
            if not (validates or saves or _due(done, settings.record_every, settings.steps)):
                continue
            try:
                reader.read()
            except TrainingError as error:
                raise TrainingError(f"{error.message}. {_where_to_go_on(checkpoints)}", code=error.code) from None
            if validate and validates:
                reader.tell(_scores(trainer, validate))
            if checkpoints and saves:
                checkpoints.save(trainer.optimizer, reader.progress)
    finally:
        # Whatever ends the run, the checkpoint that is being written outlives it.
        if checkpoints:
            checkpoints.settle()
    if checkpoints:
        checkpoints.wait()
    trainer.optimizer.finish()
    return reader.progress


def _scores(trainer: Trainer, validate: Validate) -> ScoreRecord:
    with trainer.optimizer.averaged():
        model = gathered(trainer.model, trainer.settings)
        if model is None:  # The first process has it.
            return ScoreRecord(steps=trainer.steps, scores={"score": math.nan})
        try:
            scores = validate(model, trainer.steps)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the videos of the validation after step {trainer.steps} do not fit the device's memory beside the "
                "training: use clips of a smaller size, or a device with more memory "
                f"({str(error).splitlines()[0]})",
                code="out_of_memory",
            ) from error
        return ScoreRecord(steps=trainer.steps, scores=scores)


def _where_to_go_on(checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return "This run keeps no checkpoints"
    checkpoints.wait()
    last = checkpoints.last()
    return f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"


class _Reader:
    """Keeps the steps' numbers on the device until they are read together, for each reading waits for the device."""

    def __init__(self, settings: StageSettings, progress: Progress, record: Record | None) -> None:
        self.progress = progress
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
            found = StepRecord(
                step=step,
                loss=named.pop("loss"),
                gradient_norm=named.pop("gradient_norm"),
                learning_rate=self._settings.rate(step),
                skipped=bad,
                numbers=named,
            )
            self.progress = Progress(
                steps=step + 1,
                skipped=self.progress.skipped + bad,
                skipped_in_a_row=self.progress.skipped_in_a_row + 1 if bad else 0,
                loss=found.loss,
            )
            self.tell(found)
            if self.progress.skipped_in_a_row == BAD_STEPS_IN_A_ROW:
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
        if isinstance(found, ScoreRecord):
            self.progress = replace(self.progress, scores=found.scores)
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
            f"{each:.2f} s a step, {left / 60:.0f} min left, {self.progress.skipped} skipped",
            file=sys.stderr,
            flush=True,
        )


def _due(done: int, every: int | None, steps: int) -> bool:
    return every is not None and (done % every == 0 or done == steps)
