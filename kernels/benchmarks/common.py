"""What the benchmarks share: timing in turns, the ceilings of the chip, results files and tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

OURS = "EchoVideo"
ROUNDS = 3

Timing = float | str
"""A number, or in one line why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement of ours, the bound that the chip sets it, and the others' in the same run, all in `unit`.

    `floor` is the least possible time, or the highest possible rate. A text in `against` says why there is no number.
    """

    name: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    against: Mapping[str, Timing] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the chip reaches in large products (TFLOP/s) and in a large copy (TB/s, read plus written)."""

    matmul: float
    matmul_float8: float
    copy: float


def medians(functions: Mapping[str, Callable[[], object] | str], rep: int = 200) -> dict[str, Timing]:
    """Return each function's time in ms: the median of ROUNDS medians over `rep` ms each, taken in turns.

    In turns, because the card lowers its clocks as it warms and draws its limit of power. A text stands for a
    function that is missing, and is handed on. What another's function raises becomes such a text; ours may not raise.
    """
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in functions}
    missing = {name: function for name, function in functions.items() if isinstance(function, str)}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if name in missing or isinstance(function, str):
                continue
            try:
                times[name].append(do_bench(function, warmup=rep // 3, rep=rep, return_mode="median"))
            except Exception as error:
                if name.startswith(OURS):
                    raise
                missing[name] = reason(error)
    return {name: missing[name] if name in missing else statistics.median(times[name]) for name in functions}


def reason(error: Exception) -> str:
    """Return the error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def measured(name: str, metric: str, values: Mapping[str, Timing], unit: str, floor: float | None = None) -> Row:
    """Return the row of these values by provider, ours among them."""
    value = values[OURS]
    assert not isinstance(value, str), value
    others = {other: number for other, number in values.items() if other != OURS}
    return Row(name=name, metric=metric, value=value, unit=unit, floor=floor, against=others)


def rates(times: Mapping[str, Timing], amount: float) -> dict[str, Timing]:
    """Return `amount` (FLOP or bytes) over the times in ms, in tera a second."""
    return {name: time if isinstance(time, str) else amount / time / 1e9 for name, time in times.items()}


def num_bytes(*tensors: torch.Tensor) -> int:
    """Return how many bytes the tensors hold together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||value - expected|| / ||expected|| in float64; NaN if either holds one."""
    expected = expected.double()
    return float((value.double() - expected).norm() / expected.norm())


def _ceilings() -> Ceilings:
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda").bfloat16()
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ones = torch.ones(size, 1, device="cuda")
    source = torch.randn(2**30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    times = medians(
        {
            "matmul": lambda: a @ b,
            "matmul_float8": lambda: torch._scaled_mm(
                a8, b8.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            "copy": lambda: target.copy_(source),
        }
    )
    amounts = {"matmul": 2.0 * size**3, "matmul_float8": 2.0 * size**3, "copy": 2.0 * num_bytes(source)}
    reached = {}
    for name, time in times.items():
        assert not isinstance(time, str), f"{name}: {time}"
        reached[name] = amounts[name] / time / 1e9
    return Ceilings(**reached)


def _ceiling_rows(ceilings: Ceilings) -> list[Row]:
    return [
        Row(name="bfloat16 product of 8192 x 8192 matrices", metric="ceiling", value=ceilings.matmul, unit="TFLOP/s"),
        Row(
            name="row-wise FP8 product of 8192 x 8192 matrices",
            metric="ceiling",
            value=ceilings.matmul_float8,
            unit="TFLOP/s",
        ),
        Row(name="copy of 2 GiB, read plus written", metric="ceiling", value=ceilings.copy, unit="TB/s"),
    ]


@contextmanager
def _sampled_card() -> Iterator[dict[str, object]]:
    """Yield a record of the card, to which the clocks and the power while it worked are added on leaving."""
    query = ["nvidia-smi", "--format=csv,noheader,nounits"]
    name, driver, limit = (
        subprocess.run(
            [*query, "--id=0", "--query-gpu=name,driver_version,power.limit"],
            check=True,
            capture_output=True,
            text=True,
        )
        .stdout.strip()
        .split(", ")
    )
    machine: dict[str, object] = {"gpu": name, "driver": driver, "power_limit_w": float(limit)}
    samples: list[tuple[float, float]] = []
    with subprocess.Popen(
        [*query, "--id=0", "--query-gpu=clocks.sm,power.draw", "--loop-ms=100"], stdout=subprocess.PIPE, text=True
    ) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                clock, power = line.split(", ")
                samples.append((float(clock), float(power)))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield machine
        finally:
            process.terminate()
            reader.join()
    most = max(power for _, power in samples)
    busy = sorted(clock for clock, power in samples if power > most / 2)
    machine["power_w"] = {"max": most, "median": statistics.median(p for _, p in samples if p > most / 2)}
    machine["sm_clock_mhz"] = {"min": busy[0], "median": statistics.median(busy), "max": busy[-1]}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    versions["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("torch", "triton", "diffusers", "flash-attn-4", "nvidia-cutlass-dsl", "sageattention"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def run(benchmark: str, measure: Callable[[Ceilings], Iterable[Row]]) -> Path:
    """Measure, print the tables, and write `benchmark`.json into the folder that the command line names; return it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results file")
    parser.add_argument("--commit", required=True, help="the commit measured; the GPU machine may have no history")
    arguments = parser.parse_args()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    torch.manual_seed(0)
    with _sampled_card() as machine:
        ceilings = _ceilings()
        rows = _ceiling_rows(ceilings)
        for row in measure(ceilings):
            print(f"{row.name}: {row.metric} {number(row.value)} {row.unit}", flush=True)
            rows.append(row)
    result = {
        "benchmark": benchmark,
        "machine": machine,
        "versions": _versions(),
        "commit": arguments.commit,
        "when": when,
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tables(rows))
    out: Path = arguments.out
    return out


def read(path: Path) -> tuple[dict[str, object], list[Row]]:
    """Return a results file without its rows, and the rows."""
    result = json.loads(path.read_text())
    return result, [Row(**row) for row in result.pop("rows")]


def tables(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown, a table for each metric and set of others, with the reasons for missing numbers."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.metric, row.unit, *row.against), []).append(row)
    return "\n\n".join(_table(group) for group in groups.values())


def _table(rows: list[Row]) -> str:
    first = rows[0]
    title = f"{first.metric}, {first.unit}" if first.unit else first.metric
    bounded = first.floor is not None
    heads = [title, OURS if first.against else "", *first.against, *(["bound", "share of it"] if bounded else [])]
    lines, notes = [heads], dict[str, None]()
    for row in rows:
        cells = [row.name, number(row.value)]
        for other, value in row.against.items():
            cells.append("-" if isinstance(value, str) else number(value))
            if isinstance(value, str):
                notes[f"{other}: {value}"] = None
        if row.floor is not None:
            share = row.floor / row.value if row.unit == "ms" else row.value / row.floor
            cells += [number(row.floor), f"{share:.0%}"]
        lines.append(cells)
    return "\n".join([markdown(lines), *(f"\n{note}" for note in notes)])


def markdown(lines: list[list[str]]) -> str:
    """Return lines of cells, the first of them the heads, as a Markdown table with numbers to the right."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def number(value: float) -> str:
    """Return three or four significant digits of a number."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.1 or size == 0 else f"{value:.2e}"
