"""Random numbers from seeds."""

from __future__ import annotations

import torch

from echovideo.hashing import first_uniform, uniform


def test_first_uniform_gives_the_first_number_of_each_stream_to_the_bit() -> None:
    seeds = torch.tensor([0, 7, 2**40])
    expected = torch.cat([uniform(seeds, 1, stream) for stream in (2, 3, 4)], dim=1)
    assert torch.equal(first_uniform(seeds, range(2, 5)), expected)
