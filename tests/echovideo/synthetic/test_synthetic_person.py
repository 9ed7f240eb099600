from __future__ import annotations

import itertools

import torch

from echovideo.synthetic.person import PARAMETERS, SPLITS, identity_parameters, people


def test_person_drawn_alone_or_in_a_batch_has_the_same_parameters() -> None:
    batch = people([3, 2_100_007, 11])
    assert people([2_100_007]) == [batch[1]]
    assert batch[1].seed == 2_100_007
    assert batch[0].parameters != batch[2].parameters


def test_person_of_a_fixed_seed_keeps_its_parameters() -> None:
    person = people([0])[0]
    assert [round(person[name], 4) for name in ("melanin", "eye_x", "nose_y", "mouth_width")] == [
        0.6365,
        0.3068,
        0.5749,
        0.2039,
    ]


def test_splits_share_no_seed() -> None:
    for first, second in itertools.combinations(SPLITS.values(), 2):
        assert max(first.start, second.start) >= min(first.stop, second.stop)


def test_people_of_neighbouring_seeds_are_unrelated() -> None:
    parameters = identity_parameters(torch.arange(4000)).double()
    varied = parameters - parameters.mean(0)
    neighbours = (varied[1:] * varied[:-1]).mean(0) / varied.var(0)
    assert neighbours.abs().max() < 0.07


def test_skin_tones_cover_the_whole_range_evenly() -> None:
    melanin = identity_parameters(torch.arange(3000))[:, PARAMETERS.index("melanin")]
    shares = torch.histc(melanin, 5, 0, 1) / len(melanin)
    assert melanin.min() < 0.01
    assert melanin.max() > 0.99
    assert (shares - 0.2).abs().max() < 0.03


def test_every_third_of_skin_tone_has_straight_and_coiled_hair() -> None:
    parameters = identity_parameters(torch.arange(3000))
    melanin, curl = (parameters[:, PARAMETERS.index(name)] for name in ("melanin", "curl"))
    for third in range(3):
        curls = curl[(melanin * 3).long().clamp(max=2) == third]
        assert (curls < 0.3).float().mean() > 0.08
        assert (curls > 0.6).float().mean() > 0.04
