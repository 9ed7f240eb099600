"""Random numbers from seeds by hashing: the same for a seed on every device, alone or in a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B
_STRIDE = 0x3504F333


def hashed(values: Tensor) -> Tensor:
    """Return 32 well-mixed bits of each integer of an int64 tensor, as int64."""
    mixed = values & _WORD
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * _MULTIPLIER) & _WORD
    return mixed ^ (mixed >> 16)


def uniform(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `count` numbers from [0, 1) for each int64 seed of (B,), float32 (B, count).

    Different `stream` numbers give unrelated values for the same seed. A stream holds 4096 numbers: a longer draw
    goes on into the streams that follow.
    """
    counter = torch.arange(count, device=seeds.device, dtype=torch.int64) + (stream << 12)
    return _uniform(seeds, counter)


def first_uniform(seeds: Tensor, streams: range) -> Tensor:
    """Return what `uniform` gives first of each stream of a range, for each int64 seed of (B,): (B, len(streams))."""
    counter = torch.arange(streams.start, streams.stop, streams.step, device=seeds.device, dtype=torch.int64) << 12
    return _uniform(seeds, counter)


def _uniform(seeds: Tensor, counter: Tensor) -> Tensor:
    mixed = hashed(hashed(seeds)[:, None] + hashed(counter * _STRIDE))
    return (mixed >> 8).float() / 2**24


def normal(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `count` standard normal numbers for each int64 seed of (B,), float32 (B, count), by Box and Muller.

    Takes `count` numbers of the stream, or one more, and of those that follow it. None is larger than 5.8.
    """
    half = (count + 1) // 2
    radius, angle = uniform(seeds, 2 * half, stream).split(half, dim=1)
    radius = (-2 * torch.log(1 - radius)).sqrt()
    angle = 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
