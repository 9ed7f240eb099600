from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor

from echovideo.errors import RequestError
from echovideo.synthetic.clip import ATTRIBUTES, CURVES, ClipCondition, sample_conditions, scene_curves


def curve(scene: Tensor, name: str) -> Tensor:
    return scene[:, :, CURVES.index(name)]


def test_condition_with_an_unknown_value_is_refused_with_the_values_that_exist() -> None:
    with pytest.raises(RequestError, match="glasses 'monocle' is not one of none, round, square"):
        ClipCondition(seed=0, glasses="monocle")


def test_sampled_conditions_use_every_value_equally_often() -> None:
    sampled = sample_conditions(range(3000))
    for name, values in ATTRIBUTES.items():
        counts = collections.Counter(getattr(condition, name) for condition in sampled)
        assert set(counts) == set(values)
        assert max(abs(count * len(values) / 3000 - 1) for count in counts.values()) < 0.2


def test_turns_go_to_the_side_they_are_named_after_and_stay_within_thirty_degrees() -> None:
    for motion, sign in (("turn_left", -1), ("turn_right", 1)):
        for pose in ATTRIBUTES["pose"]:
            scene = scene_curves([ClipCondition(seed=seed, motion=motion, pose=pose) for seed in range(20)], 17)
            yaw = curve(scene, "yaw")
            assert ((yaw[:, -1] - yaw[:, 0]) * sign).min() > 8
            assert yaw.abs().max() < 30.5


def test_head_rotation_columns_are_the_angles_rotation() -> None:
    scene = scene_curves(sample_conditions(range(30)), 3)
    turn = torch.stack([curve(scene, f"turn_{entry}") for entry in range(9)], dim=-1).view(30, 3, 3, 3)
    torch.testing.assert_close(turn @ turn.transpose(-1, -2), torch.eye(3).expand_as(turn), atol=1e-6, rtol=0)
    nose = turn[..., 2]
    yaw, roll = torch.deg2rad(curve(scene, "yaw")), torch.deg2rad(curve(scene, "roll"))
    pitch = torch.deg2rad(curve(scene, "pitch"))
    sideways = torch.cos(roll) * torch.sin(yaw) * torch.cos(pitch) + torch.sin(roll) * torch.sin(pitch)
    torch.testing.assert_close(nose[..., 0], sideways)


def test_reference_curves_are_still_and_frontal() -> None:
    scene = scene_curves([ClipCondition(seed=seed) for seed in (4, 5)], 1, reference=True)
    assert torch.equal(scene[0], scene[1])
    assert curve(scene, "yaw").abs().max() < 1
    assert curve(scene, "blink").max() == 0


def test_clip_curves_do_not_depend_on_the_batch() -> None:
    conditions = sample_conditions(range(5))
    torch.testing.assert_close(scene_curves(conditions, 9)[3:4], scene_curves(conditions[3:4], 9))
