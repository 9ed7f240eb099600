"""Put the results into README, between two marks: `python -m pipelines.serving.benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.serving.benchmarks import RESULTS

README = Path(__file__).parents[3] / "README.md"
BEGIN, END = "<!-- begin: service benchmark -->\n", "<!-- end: service benchmark -->\n"


def table(record: dict[str, Any]) -> str:
    """Return the results as a Markdown table, with what they were measured on above it."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items()))
    lines = [f"{record['machine']}; {versions}; {record['when'][:10]}.", "", "| what | measure | value | at most |"]
    lines.append("|---|---|---|---|")
    for row in record["rows"]:
        bar = "" if row["floor"] is None else f"{row['floor']:g} {row['unit']}".strip()
        value = f"{row['value']:,.0f} {row['unit']}" if row["value"] >= 100 else f"{row['value']:.3g} {row['unit']}"
        lines.append(f"| {row['name']} | {row['metric']} | {value.strip()} | {bar} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite README's table."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table(json.loads((RESULTS / "service.json").read_text())) + END + after)


if __name__ == "__main__":
    main()
