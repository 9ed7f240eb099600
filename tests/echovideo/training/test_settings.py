"""Stage settings: what makes none, rates, and the record as JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echovideo.errors import TrainingError
from echovideo.training.settings import (
    AdapterSettings,
    AverageSettings,
    StageSettings,
    base,
    one_person,
    stage_one,
    stage_two,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("groups", ()),
        ("groups", ("fusion", "fusion")),
        ("groups", ("head",)),
        ("face_latent", "sometimes"),
        ("face_latent_dropout", 1.1),
        ("condition_dropout", -0.1),
        ("face_mask_weight", -1.0),
        ("learning_rate", 0.0),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("adapter", AdapterSettings(rank=0, groups=())),
        ("average", AverageSettings(decay=1.0)),
        ("validate_every", 0),
    ],
)
def test_stage_settings_that_make_none_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(TrainingError, match=f"training setting {name} = ") as caught:
        replace(stage_two(steps=10, batch_size=2), **{name: value})
    assert caught.value.code == "settings"


def test_stage_settings_with_a_group_in_full_and_adapted_are_refused() -> None:
    with pytest.raises(TrainingError, match="groups"):
        stage_one(steps=1, batch_size=1, groups=("attention",), adapter=AdapterSettings(rank=4))


def test_rate_warms_up_and_falls_to_nothing() -> None:
    chosen = base(steps=110, batch_size=1, learning_rate=2.0, warmup_steps=10)
    assert [chosen.rate(step) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 1.0, 0.0])
    constant = base(steps=110, batch_size=1, learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert {constant.rate(step) for step in range(110)} == {2.0}


def test_stage_settings_survive_json_and_tell_numbers_from_cadence() -> None:
    chosen = stage_two(
        steps=5,
        batch_size=2,
        groups=("fusion",),
        adapter=AdapterSettings(rank=4, groups=("attention", "feed_forward")),
        average=AverageSettings(decay=0.9, device="cpu", every=4),
    )
    assert StageSettings.from_dict(chosen.to_dict()) == chosen
    slower = StageSettings.from_dict(chosen.to_dict() | {"recomputed_blocks": 3, "checkpoint_every": 7})
    assert slower.numbers() == chosen.numbers()
    assert StageSettings.from_dict(chosen.to_dict() | {"seed": 3}).numbers() != chosen.numbers()


def test_stage_settings_with_an_unknown_key_are_refused() -> None:
    with pytest.raises(TrainingError, match="batchsize"):
        StageSettings.from_dict({"batchsize": 3})


def test_stages_differ_as_the_paper_says() -> None:
    one, two = stage_one(steps=1, batch_size=1), stage_two(steps=1, batch_size=1)
    assert (one.groups, one.face_latent) == (("fusion",), "off")
    assert (len(two.groups), two.face_latent, two.face_latent_dropout) == (6, "drop", 0.5)
    assert base(steps=1, batch_size=1).identity_dropout == 1.0


def test_one_person_trains_fusion_in_full_and_attention_by_low_rank_layers() -> None:
    chosen = one_person(steps=50, batch_size=2, rank=4, recomputed_blocks=3)
    assert (chosen.groups, chosen.adapter) == (("fusion",), AdapterSettings(rank=4, groups=("attention",)))
    assert (chosen.references, chosen.face_latent, chosen.recomputed_blocks) == ("cross_clip", "drop", 3)
    assert (chosen.warmup_steps, chosen.checkpoint_every, chosen.validate_every) == (5, 50, 13)
