from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from echovideo.evaluation.cases import draw_gallery, drawn_cases
from echovideo.evaluation.judges import (
    Budget,
    DrawnClips,
    attribute_indices,
    attribute_loss,
    degrade,
    draw_clips,
    identity_loss,
    mark_visible,
    measure,
    train_judges,
)
from echovideo.evaluation.networks import (
    FRAMES,
    MOLE_COLUMNS,
    MOLE_ROWS,
    SEEN_FRAMES,
    TRAITS,
    AttributeJudge,
    IdentityJudge,
    Judges,
    load_judges,
    mole_map,
    save_judges,
)
from echovideo.evaluation.scores import expect, look
from echovideo.results import reaches
from echovideo.synthetic.clip import ATTRIBUTES, ClipCondition
from echovideo.synthetic.person import PARAMETERS, SPLITS, identity_parameters

SIDE = 32


@pytest.fixture(scope="module")
def clips() -> DrawnClips:
    return draw_clips(SPLITS["judge"][5:7], SIDE, "cpu", compiled=False)


@pytest.fixture(scope="module")
def trained() -> Judges:
    """Judges that saw a few steps of training: of the right shapes, and bad at their work."""
    budget = Budget(seconds=2, people_drawn=2, people_kept=2, people_read=2, people_compared=2, side=SIDE)
    judges, steps = train_judges(budget, "cpu")
    assert steps >= 1
    return judges


def losses(network: nn.Module, loss: Callable[[], Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
    values = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        values.append(value.item())
    return values


def test_losses_few_clips_seen_again_and_again_are_learnt(clips: DrawnClips) -> None:
    torch.manual_seed(0)
    frames = clips.frames.float() / 255
    attribute, identity = AttributeJudge(), IdentityJudge()

    def reading() -> Tensor:
        return attribute_loss(
            attribute,
            frames[0],
            clips.points[0],
            clips.attributes[0],
            clips.nuisances[0] / 10,
        )

    first, *_, last = losses(attribute, reading, 8)
    assert last < 0.5 * first
    first, *_, last = losses(
        identity, lambda: identity_loss(identity, frames[:, :, 4], clips.points[:, :, 4], clips.identity), 10
    )
    assert last < 0.5 * first


def test_draw_clips_truths_are_those_of_the_frames(clips: DrawnClips) -> None:
    assert clips.frames.shape == (2, 2, SEEN_FRAMES, 3, SIDE, SIDE)
    assert clips.frames.dtype == torch.uint8
    torch.testing.assert_close(clips.identity, identity_parameters(torch.tensor(SPLITS["judge"][5:7])))
    # The two clips of a person differ in what happens.
    assert (clips.attributes[:, 0] != clips.attributes[:, 1]).any()


def test_attribute_indices_follow_the_order_of_attributes() -> None:
    condition = ClipCondition(seed=0, pose="down", background="sunset")
    indices = dict(zip(ATTRIBUTES, attribute_indices([condition])[0].tolist(), strict=True))
    assert (indices["pose"], indices["background"], indices["expression"]) == (4, 5, 0)


def test_degrade_changes_each_clip_a_little_and_stays_a_picture(clips: DrawnClips) -> None:
    frames = clips.frames.flatten(0, 1).float() / 255
    spoilt = degrade(frames, torch.Generator().manual_seed(0))
    assert 0 <= float(spoilt.min()) <= float(spoilt.max()) <= 1
    change = (spoilt - frames).abs().mean(dim=(1, 2, 3, 4))
    assert bool(((change > 0.002) & (change < 0.08)).all())


def test_mole_map_marks_the_cell_of_each_mole_that_has_a_size() -> None:
    identity = torch.zeros(1, len(PARAMETERS))
    for name, value in {"mole_0_x": -0.49, "mole_0_y": 0.84, "mole_0_size": 0.03, "mole_1_x": 0.2}.items():
        identity[0, PARAMETERS.index(name)] = value
    cells = mole_map(identity)[0].reshape(MOLE_ROWS, MOLE_COLUMNS)
    assert cells.sum() == 1
    assert cells[-1, 0] == 1


def test_saved_judges_read_as_before_and_fit_the_repository(trained: Judges, tmp_path: Path) -> None:
    mark_visible(trained, SPLITS["validation"][:2], SIDE, "cpu")
    save_judges(trained, tmp_path)
    loaded = load_judges(tmp_path)
    assert all(path.stat().st_size <= 8_000_000 for path in tmp_path.iterdir())
    frames = torch.randint(0, 256, (2, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8)
    before, after = trained.read(frames), loaded.read(frames)
    torch.testing.assert_close(after.nuisances, before.nuisances, rtol=0, atol=1e-3)
    torch.testing.assert_close(after.traits, before.traits, rtol=0, atol=1e-3)
    torch.testing.assert_close(after.embeddings.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(loaded.identity.visible, trained.identity.visible)


def test_read_picture_is_a_clip_that_stands_still(trained: Judges) -> None:
    picture = torch.randint(0, 256, (1, 1, SIDE, SIDE, 3), dtype=torch.uint8)
    one, still = trained.read(picture), trained.read(picture.expand(1, FRAMES, SIDE, SIDE, 3))
    torch.testing.assert_close(one.traits, still.traits)
    with pytest.raises(AssertionError, match="17 frames"):
        trained.read(picture.expand(1, 5, SIDE, SIDE, 3))


def test_measure_barely_trained_judges_have_a_row_for_everything_and_miss_the_floors(trained: Judges) -> None:
    rows = {(row.name, row.metric): row for row in measure(trained, SPLITS["test"][:2], SIDE, "cpu")}
    assert {name for name, metric in rows if metric == "right"} == {
        f"{state}: {name}" for state in ("as drawn", "degraded") for name in ATTRIBUTES
    }
    assert sum(metric in ("trait", "visible trait") for _, metric in rows) == 2 * len(TRAITS)
    macro = rows["as drawn", "attributes right, macro"]
    each = [rows[f"as drawn: {name}", "right"].value for name in ATTRIBUTES]
    assert macro.value == pytest.approx(np.mean(each))
    assert not reaches([macro])


def test_look_collects_what_the_judges_read_beside_the_truth(trained: Judges) -> None:
    cases = [replace(case, asked={"pose": case.asked["pose"]}) for case in drawn_cases(seeds=SPLITS["test"][:2])]
    pictures = draw_gallery([case.person for case in cases])
    clips = pictures.expand(-1, FRAMES, -1, -1, -1)
    expected = expect(trained, cases, truths_BFHWC=clips, references_BFHWC=pictures, gallery_BFHWC=pictures)
    evidence = look(trained, clips, expected)
    np.testing.assert_array_equal(evidence.person, [0, 1])
    np.testing.assert_allclose(evidence.ssim_to_reference, 1)
    np.testing.assert_allclose(evidence.flicker, 0)
    np.testing.assert_allclose(evidence.embedding, evidence.gallery, atol=1e-6)
    np.testing.assert_array_equal(evidence.asked[:, 1:], -1)
    assert evidence.referenced[0, 0] == ATTRIBUTES["pose"].index(cases[0].reference.pose)
