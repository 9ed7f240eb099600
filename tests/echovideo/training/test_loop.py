"""The loop on one process: it learns, it skips what is not a number, it gives the same numbers again."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from echovideo.errors import DatasetError, TrainingError
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.tiny.parts import scheduler
from echovideo.training.batch import NullCondition, TrainingBatch, example_seeds
from echovideo.training.groups import group_of
from echovideo.training.loop import train
from echovideo.training.objective import NoiseSchedule
from echovideo.training.settings import AverageSettings, StageSettings
from tests.echovideo.training.small import (
    Kept,
    SmallSource,
    make_batch,
    null_condition,
    schedule,
    settings,
    small_model,
)


def _train(
    chosen: StageSettings, source: SmallSource | None = None, model: EchoVideoTransformer3DModel | None = None
) -> tuple[EchoVideoTransformer3DModel, Kept, int]:
    model, kept = model or small_model(), Kept()
    progress = train(model, schedule(), source or SmallSource(), null_condition(), chosen, record=kept)
    return model, kept, progress.skipped


class _OneBatch:
    """The same examples at every step, with the same noise."""

    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        return make_batch(torch.arange(4))


def test_train_on_the_same_examples_learns_them() -> None:
    kept = Kept()
    chosen = settings(steps=40, schedule="constant", learning_rate=3e-3)
    train(small_model(), schedule(), _OneBatch(), null_condition(), chosen, record=kept)
    assert kept.losses[-1] < 0.75 * kept.losses[0]
    assert [found.step for found in kept.steps] == list(range(40))
    assert [found.learning_rate for found in kept.steps[:3]] == [1.5e-3, 3e-3, 3e-3]


def test_train_again_gives_the_same_losses_and_weights() -> None:
    (first, a, _), (second, b, _) = _train(settings()), _train(settings(record_every=5))
    assert a.losses == b.losses
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_train_with_recomputed_blocks_gives_the_same_losses() -> None:
    assert _train(settings(recomputed_blocks=2))[1].losses == _train(settings())[1].losses


@pytest.mark.parametrize("group", ["fusion", "attention", "feed_forward", "norms", "patch_embed", "output"])
def test_train_of_one_group_moves_it_and_nothing_else(group: str) -> None:
    model, _, _ = _train(settings(groups=(group,), face_latent="on"))
    start = small_model()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start.get_parameter(name))}
    assert {group_of(name) for name in moved} == {group}
    assert len(moved) == sum(group_of(name) == group for name, _ in model.named_parameters())


def test_train_with_a_broken_step_skips_it_and_goes_on() -> None:
    model, kept, skipped = _train(settings(), SmallSource(broken=(2, 4)))
    assert skipped == 2
    assert [found.step for found in kept.steps if found.skipped] == [2, 4]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_train_with_three_broken_steps_in_a_row_stops_with_the_weights_before_them() -> None:
    good, _, _ = _train(settings(steps=2, schedule="constant"))
    model = small_model()
    with pytest.raises(TrainingError, match="steps 2 to 4 gave no finite loss or gradient") as caught:
        _train(settings(steps=5, schedule="constant", record_every=1), SmallSource(broken=(2, 3, 4)), model)
    assert caught.value.code == "not_finite"
    for name, parameter in good.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_train_in_bfloat16_follows_float32() -> None:
    _, rounded, _ = _train(settings(steps=10), model=small_model().bfloat16())
    _, exact, _ = _train(settings(steps=10))
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)


def test_train_validates_the_average_at_its_cadence_and_ends_with_it() -> None:
    model, seen, kept = small_model(), [], Kept()

    def validate(lent: EchoVideoTransformer3DModel, steps: int) -> Mapping[str, float]:
        seen.append(lent.proj_out.weight.detach().clone())
        return {"score": float(steps)}

    chosen = settings(average=AverageSettings(decay=0.999), validate_every=4)
    train(model, schedule(), SmallSource(), null_condition(), chosen, record=kept, validate=validate)
    assert [(found.steps, dict(found.scores)) for found in kept.scores] == [(4, {"score": 4.0}), (6, {"score": 6.0})]
    assert torch.equal(seen[-1], model.proj_out.weight)
    plain = small_model()
    train(plain, schedule(), SmallSource(), null_condition(), settings())
    assert not torch.equal(plain.proj_out.weight, model.proj_out.weight)
    assert torch.allclose(plain.proj_out.weight, model.proj_out.weight, atol=0.01)


def test_train_with_a_batch_of_another_size_than_the_settings_is_refused() -> None:
    with pytest.raises(DatasetError, match="the source gave 2 examples of 4 / 1"):
        _train(settings(), SmallSource(batch_size=2))


def test_training_batch_of_tensors_that_do_not_belong_together_names_them() -> None:
    batch = make_batch(torch.arange(2))
    values = {name: getattr(batch, name) for name in batch.__slots__}
    with pytest.raises(DatasetError, match=r"face_share_BFHW is \(2, 1, 4, 6\), expected \(2, 2, 4, 6\)"):
        TrainingBatch(**values | {"face_share_BFHW": batch.face_share_BFHW[:, :1]})
    with pytest.raises(DatasetError, match="text_BND holds 1 examples, the latents 2"):
        TrainingBatch(**values | {"text_BND": batch.text_BND[:1]})


def test_example_seeds_are_those_of_the_places_whatever_the_slices() -> None:
    whole = example_seeds(3, 17, torch.arange(8))
    parts = [example_seeds(3, 17, torch.arange(start, start + 2)) for start in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    many = torch.cat([example_seeds(3, step, torch.arange(64)) for step in range(100)])
    assert len(many.unique()) == 6400
    assert not torch.equal(example_seeds(4, 17, torch.arange(8)), whole)


def test_null_condition_moves_as_a_whole() -> None:
    null = null_condition().to("meta")
    assert isinstance(null, NullCondition)
    assert {null.text_1ND.device.type, null.face_tokens_1ND.device.type} == {"meta"}


@pytest.mark.gpu
def test_train_as_a_graph_gives_the_losses_of_launches_one_by_one() -> None:
    class OnDevice(SmallSource):
        def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
            return super().batch(step, rank, world_size).to("cuda")

    losses = []
    for graphed in (False, True):
        kept = Kept()
        source, null = OnDevice(broken=(2,)), null_condition().to("cuda")
        on_device = NoiseSchedule.of(scheduler(), 0.7, "cuda")
        progress = train(small_model().cuda(), on_device, source, null, settings(), graphed=graphed, record=kept)
        assert progress.skipped == 1
        losses.append([found.loss for found in kept.steps if not found.skipped])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def _run_out(*_: object) -> Mapping[str, float]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore lines")


def test_train_whose_step_does_not_fit_the_memory_says_what_to_lower() -> None:
    model = small_model()
    model.register_forward_pre_hook(_run_out)
    with pytest.raises(TrainingError, match=r"step 0 does not fit .* 0 of 2 blocks .*Tried to allocate 9.00 GiB\.\)"):
        train(model, schedule(), SmallSource(), null_condition(), settings())


def test_train_whose_validation_does_not_fit_the_memory_says_so() -> None:
    chosen = settings(validate_every=2)
    with pytest.raises(TrainingError, match=r"validation after step 2 .*Tried to allocate 9.00 GiB\.\)") as caught:
        train(small_model(), schedule(), SmallSource(), null_condition(), chosen, validate=_run_out)
    assert caught.value.code == "out_of_memory"
