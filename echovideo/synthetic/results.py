"""The results files of the measurements in the drawn world."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured number; `floor` is the least that it must be, `against` other ways of doing the same."""

    name: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    against: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the value reaches its floor."""
        return self.floor is None or self.value >= self.floor


def write_results(
    benchmark: str, machine: str, rows: Sequence[Row], commit: str | None, folder: Path = RESULTS
) -> Path:
    """Print the rows as a table, write them to <benchmark>.json in `folder` and return its path.

    `commit` names the measured code where it is not a git checkout.
    """
    commit = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    record = {
        "benchmark": benchmark,
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    for row in rows:
        floor = "" if row.floor is None else f"at least {row.floor:g}"
        print(f"{row.name:24} {row.metric:26} {row.value:12.4f} {row.unit:10} {floor}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return path
