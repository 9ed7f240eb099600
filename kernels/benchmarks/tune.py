"""Chooses the kernels' settings by measurement on this chip, and writes them as `tuned.json`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import OURS, Ceilings, Row, measured, medians, run
from benchmarks.peers import (
    CONFIG,
    HEAD_DIM,
    LATENT_FRAMES,
    MAIN_SIZE,
    NUM_HEADS,
    NUM_TEXT,
    grid,
    inputs,
    num_tokens,
)
from echovideo.model.rotary import rotary_tables
from echovideo_kernels import FOLDED_SCALE, folded_query_scale
from echovideo_kernels.attention import attention_reference
from echovideo_kernels.linear import _launch_quantize

# The package exports functions under these modules' names.
attention, modulated_norm, qk_norm_rope = (
    importlib.import_module(f"echovideo_kernels.{name}") for name in ("attention", "modulated_norm", "qk_norm_rope")
)

BATCH = 2
LENGTH = num_tokens(*MAIN_SIZE)
_SHORT_LENGTHS = (512, 1024, 2048, 4096)
_STAGES = (3, 4, 6)
_REP = 60

Settings = dict[str, int]
Launch = Callable[[Settings], object]

# The first value of each is where the search starts.
_NORM_ROPE = {"ROWS": (32, 8, 16, 64, 128), "num_warps": (4, 2, 8)}
_NORM_ROPE_BACKWARD = {"ROWS": (16, 8, 32, 64), "num_warps": (4, 2, 8), "PROGRAMS": (1024, 264, 528, 2112)}
_MODULATED = {
    "num_warps": (4, 2, 8),
    "CHUNK": (1024, 512, 4096),
    "ROWS": (1, 2, 4),
    "TOKENS": (16, 8, 32, 64),
    "STAGES": (1, 2, 3),
}
_MODULATED_BACKWARD = {**_MODULATED, "num_warps": (8, 4, 16), "TOKENS": (64, 16, 32, 128)}
_QUANTIZE = {"CHUNK": (2048, 1024, 4096, 16384), "num_warps": (8, 4, 16)}


def measure(operators: dict[str, Settings], _: Ceilings) -> Iterator[Row]:
    """Measure every setting tried, and put the best ones, and from how many tokens on they serve, into `operators`."""
    yield from _attention(operators)
    for operator, launch, choices in _launchers():
        yield from _descend(operators, operator, launch, choices)


def _attention(operators: dict[str, Settings]) -> Iterator[Row]:
    q, k, v = inputs(BATCH, LENGTH)
    times = medians({str(stages): partial(_ours, q, k, v, stages) for stages in _STAGES})
    for stages, time in times.items():
        if not isinstance(time, str):
            yield Row(name=f"attention, stages {stages}", metric="time", value=time, unit="ms")
    best = int(_fastest(times))
    slower: list[int] = []
    for length in _SHORT_LENGTHS:
        for batch in (1, 2):
            q, k, v = inputs(batch, length)
            pair = medians(
                {
                    OURS: partial(_ours, q, k, v, best),
                    "PyTorch": partial(attention_reference, q, k, v, FOLDED_SCALE),
                },
                _REP,
            )
            row = measured(f"attention, {length} tokens, batch {batch}", "time", pair, "ms")
            if _fastest(pair) != OURS:
                slower.append(length)
            yield row
    longer = [length for length in _SHORT_LENGTHS if length > max(slower, default=0)]
    operators["attention"] = {"from_tokens": longer[0] if longer else LENGTH, "stages": best}


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stages: int) -> object:
    return attention.launch_attention(q, k, v, FOLDED_SCALE, with_lse=False, stages=stages)


def _fastest(times: Mapping[str, float | str]) -> str:
    numbers = {name: time for name, time in times.items() if not isinstance(time, str)}
    return min(numbers, key=numbers.__getitem__)


def _descend(
    operators: dict[str, Settings], operator: str, launch: Launch, choices: Mapping[str, tuple[int, ...]]
) -> Iterator[Row]:
    """Take the best value of one setting after another, the rest held; what does not compile is passed over."""
    chosen = {setting: values[0] for setting, values in choices.items()}
    for setting, values in choices.items():
        times = medians({str(value): partial(launch, {**chosen, setting: value}) for value in values}, _REP)
        for value, time in times.items():
            if not isinstance(time, str):
                name = ", ".join(f"{k} {v}" for k, v in {**chosen, setting: int(value)}.items())
                yield Row(name=f"{operator}: {name}", metric="time", value=time, unit="ms")
        chosen[setting] = int(_fastest(times))
    operators[operator] = {"from_tokens": 0, **chosen}


def _launchers() -> Iterator[tuple[str, Launch, Mapping[str, tuple[int, ...]]]]:
    q, k, dq, q_out, k_out = (
        torch.randn(BATCH, LENGTH, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(5)
    )
    weight, bias = torch.randn(2, HEAD_DIM, device="cuda").bfloat16()
    tables = rotary_tables(LATENT_FRAMES, *grid(*MAIN_SIZE), device="cuda")
    scale = folded_query_scale(HEAD_DIM)
    arguments = (q, k, weight, bias, weight, bias, *tables, scale, 1e-6, q_out, k_out)
    yield "qk_norm_rope", lambda config: qk_norm_rope._launch_forward(*arguments, config), _NORM_ROPE
    backward = (dq, q, weight, *tables, scale, 1e-6)
    yield (
        "qk_norm_rope_backward",
        lambda config: qk_norm_rope._launch_backward(*backward, config),
        _NORM_ROPE_BACKWARD,
    )

    dim = CONFIG.inner_dim
    x, branch, residual, y = (torch.randn(BATCH, LENGTH, dim, device="cuda").bfloat16() for _ in range(4))
    shift, norm_scale, gate = (0.3 * torch.randn(BATCH, 2, dim, device="cuda").bfloat16() for _ in range(3))
    weight, bias = torch.randn(2, dim, device="cuda").bfloat16()
    forward = (x, shift, norm_scale, weight, bias, branch, gate, NUM_TEXT, CONFIG.norm_eps, residual, y, None)
    yield "modulated_norm", lambda config: modulated_norm._launch_forward(*forward, config), _MODULATED
    grads = (x, norm_scale, weight, branch, gate, NUM_TEXT, CONFIG.norm_eps, residual, y)
    yield (
        "modulated_norm_backward",
        lambda config: modulated_norm._launch_backward(*grads, config),
        _MODULATED_BACKWARD,
    )
    wide = torch.randn(BATCH, LENGTH, 4 * dim, device="cuda").bfloat16()
    yield "quantize_rows", lambda config: _launch_quantize(wide, True, config), _QUANTIZE


def main() -> None:
    """Tune, and write `tuned.json` beside the results file: the package's own table with what was tuned renewed."""
    operators: dict[str, Settings] = {}
    out = run("tune", partial(measure, operators))
    table = json.loads((Path(attention.__file__).parent / "tuned.json").read_text())
    major, minor = torch.cuda.get_device_capability()
    chip = table.setdefault(f"sm_{major}{minor}", {"operators": {}})
    chip["measured_on"] = torch.cuda.get_device_name()
    chip["operators"].update(operators)
    (out / "tuned.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
