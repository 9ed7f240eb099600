from __future__ import annotations

import dataclasses

import pytest
import torch

from echovideo.synthetic.clip import CURVES, ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing, draw, draw_references, draw_tensors
from echovideo.synthetic.person import PARAMETERS, Person, people

PLAIN = ClipCondition(seed=3, pose="front", motion="still")


def with_column(person: Person, name: str, value: float) -> Person:
    parameters = list(person.parameters)
    parameters[PARAMETERS.index(name)] = value
    return dataclasses.replace(person, parameters=tuple(parameters))


@pytest.fixture(scope="module")
def clips() -> Drawing:
    return draw(people([0, 1, 2]), sample_conditions([10, 11, 12]), frames=9)


def test_drawing_has_frames_masks_and_points_of_the_size_asked_for() -> None:
    drawing = draw(people([1]), [PLAIN], frames=2, height=48, width=80)
    assert drawing.frames_BFCHW.shape == (1, 2, 3, 48, 80)
    assert drawing.face_BFHW.shape == drawing.hair_BFHW.shape == (1, 2, 48, 80)
    assert drawing.landmarks_BF52.shape == (1, 2, 5, 2)
    for values in (drawing.frames_BFCHW, drawing.face_BFHW, drawing.hair_BFHW):
        assert values.min() >= 0
        assert values.max() <= 1


def test_person_drawn_alone_equals_the_same_person_in_a_batch(clips: Drawing) -> None:
    alone = draw(people([1]), sample_conditions([11]), frames=9)
    torch.testing.assert_close(alone.frames_BFCHW[0], clips.frames_BFCHW[1], atol=2e-4, rtol=0)
    torch.testing.assert_close(alone.landmarks_BF52[0], clips.landmarks_BF52[1], atol=1e-3, rtol=0)


def test_drawing_twice_gives_the_same_pixels(clips: Drawing) -> None:
    again = draw(people([0, 1, 2]), sample_conditions([10, 11, 12]), frames=9)
    assert torch.equal(again.frames_BFCHW, clips.frames_BFCHW)


def test_still_clip_moves_little_and_a_turn_moves_much() -> None:
    still, turned = (
        draw(people([5]), [dataclasses.replace(PLAIN, motion=motion)], frames=5).landmarks_BF52
        for motion in ("still", "turn_left")
    )
    assert (still[0, -1] - still[0, 0]).norm(dim=-1).max() < 2
    assert (turned[0, -1, 2, 0] - turned[0, 0, 2, 0]) < -5


def test_another_background_changes_no_pixel_of_the_person() -> None:
    person = people([8])
    wall, beach = (draw(person, [dataclasses.replace(PLAIN, background=name)], frames=1) for name in ("wall", "beach"))
    covered = (wall.face_BFHW + wall.hair_BFHW)[:, :, None] > 0.999
    difference = (wall.frames_BFCHW - beach.frames_BFCHW).abs()
    assert torch.equal(wall.face_BFHW, beach.face_BFHW)
    assert covered.float().mean() > 0.15
    assert (difference * covered).max() < 1e-4
    assert difference[..., :8, :8].min() > 0.01


def test_face_mask_holds_the_five_points_and_not_the_corners(clips: Drawing) -> None:
    pixels = clips.landmarks_BF52.floor().long()
    for clip, frame in ((0, 0), (1, 4), (2, 8)):
        for x, y in pixels[clip, frame].tolist():
            assert clips.face_BFHW[clip, frame, y, x] > 0.9
        assert clips.face_BFHW[clip, frame, 0, 0] == 0
        assert clips.face_BFHW[clip, frame, -1, -1] == 0


@pytest.mark.parametrize(
    ("column", "value", "points"), [("blink", 1.0, (0, 1)), ("mouth_round", 1.0, (3, 4))], ids=["blink", "round mouth"]
)
def test_expression_changes_pixels_around_its_own_points(column: str, value: float, points: tuple[int, int]) -> None:
    identity = torch.tensor([people([20])[0].parameters])
    scene = scene_curves([PLAIN], 1, reference=True)
    changed = scene.clone()
    changed[..., CURVES.index(column)] = value
    before, after = draw_tensors(identity, scene, 96, 96), draw_tensors(identity, changed, 96, 96)
    weight = (before.frames_BFCHW - after.frames_BFCHW).abs().sum(2)[0, 0]
    weight = weight * (weight > 0.25 * weight.max())
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    centre = torch.stack(((weight * columns).sum(), (weight * rows).sum())) / weight.sum()
    expected = before.landmarks_BF52[0, 0, list(points)].mean(0)
    assert (centre - expected).norm() < 4


@pytest.mark.parametrize(("name", "change", "point"), [("nose_y", 0.1, 2), ("eye_x", 0.05, 1), ("mouth_y", 0.07, 3)])
def test_identity_parameter_moves_its_point_and_no_other(name: str, change: float, point: int) -> None:
    person = people([30])[0]
    before, after = draw_references([person, with_column(person, name, person[name] + change)]).landmarks_BF52[:, 0]
    moved = (after - before).norm(dim=-1)
    assert moved[point] > 1
    if name != "eye_x":
        assert moved[:2].max() < 0.2


def test_darker_skin_is_darker_in_the_picture_all_the_way() -> None:
    person = people([40])[0]
    tones = [with_column(person, "melanin", number / 5) for number in range(6)]
    drawing = draw_references(tones)
    luma = (drawing.frames_BFCHW * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(2)
    skin = (luma * drawing.face_BFHW).sum((1, 2, 3)) / drawing.face_BFHW.sum((1, 2, 3))
    assert (skin[:-1] - skin[1:]).min() > 0.02


def test_features_keep_their_contrast_on_the_darkest_skin() -> None:
    shown = people(range(40, 48))
    contrast = []
    for tone in (0.05, 0.95):
        drawing = draw_references([with_column(person, "melanin", tone) for person in shown])
        for frame, mask in zip(drawing.frames_BFCHW[:, 0], drawing.face_BFHW[:, 0], strict=True):
            luma = frame.mean(0)[mask > 0.99]
            contrast.append(float(luma.std() / luma.mean()))
    light, dark = sum(contrast[:8]) / 8, sum(contrast[8:]) / 8
    assert dark > 0.95 * light


@pytest.mark.gpu
def test_compiled_drawing_on_the_gpu_equals_the_cpus() -> None:
    drawing = draw(people([0, 1]), sample_conditions([10, 11]), frames=5)
    compiled = draw(people([0, 1]), sample_conditions([10, 11]), frames=5, device="cuda", compiled=True)
    difference = (compiled.frames_BFCHW.cpu() - drawing.frames_BFCHW).abs()
    assert difference.mean() < 1e-3
    torch.testing.assert_close(compiled.landmarks_BF52.cpu(), drawing.landmarks_BF52, atol=0.02, rtol=0)
