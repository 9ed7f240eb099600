"""Results files: rows of numbers, and what they were measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured number. `floor` is the bar: the most that a time or a count of errors may be, None without one."""

    name: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    against: Mapping[str, float] = field(default_factory=dict)


def write(rows: Sequence[Row], path: Path, *, machine: str, packages: Sequence[str], commit: str | None = None) -> None:
    """Write the rows, in place of those of the same names that the file has; `commit` is HEAD's unless given."""
    names = {row.name for row in rows}
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    record = {
        "benchmark": path.stem,
        "machine": machine,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "commit": commit or _head(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [row for row in earlier if row["name"] not in names] + [asdict(row) for row in rows],
    }
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _head() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout.strip()
