"""Results files of benchmarks: rows of measured numbers, what they were measured on, and at which commit."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured number; `against` holds other ways of doing the same, in the same run, or why there is no number.

    `floor` is the bar, None without one: the least that a rate or a score may be, the most that a time may be.
    """

    name: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    against: Mapping[str, float | str] = field(default_factory=dict)


def write_results(
    benchmark: str,
    rows: Sequence[Row],
    folder: Path,
    *,
    machine: str,
    packages: Sequence[str] = ("torch",),
    commit: str | None = None,
    keeps_others: bool = False,
) -> Path:
    """Print the rows, write them to <benchmark>.json in `folder`, and return its path.

    `packages` are those whose versions matter. `commit` names the measured code; without one it is the git checkout's,
    or the installed release's version. With `keeps_others`, rows of other names that the file has stay in it.
    """
    for row in rows:
        bar = "" if row.floor is None else f"  bar {row.floor:g}"
        others = ", ".join(f"{other}: {value}" for other, value in row.against.items())
        print(f"{row.name:32} {row.metric:28} {row.value:12.4f} {row.unit:12}{bar}  {others}".rstrip())
    path = folder / f"{benchmark}.json"
    names = {row.name for row in rows}
    earlier = json.loads(path.read_text())["rows"] if keeps_others and path.exists() else []
    record = {
        "benchmark": benchmark,
        "machine": machine,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": commit or _head(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [row for row in earlier if row["name"] not in names] + [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return path


def reaches(rows: Sequence[Row]) -> bool:
    """Whether every row with a bar is at least that."""
    return all(row.floor is None or row.value >= row.floor for row in rows)


def machine_name(device: torch.device | str) -> str:
    """Return what a results file calls a device: the GPU's name, or how many of the CPU's threads are used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def _head() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        # Installed, and no checkout.
        return f"echovideo {version('echovideo')}"
    return done.stdout.strip()
