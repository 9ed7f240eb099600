"""Draws the charts, and writes the tables of kernels/README.md and README.md, from `results/*.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from benchmarks.common import OURS, Row, markdown, number, read, tables

ROOT = Path(__file__).parents[2]
START, END = "<!-- kernels:start -->", "<!-- kernels:end -->"

Results = Mapping[str, tuple[dict[str, Any], list[Row]]]
"""By benchmark: what was measured where and when, and the rows."""

_MAIN = "848x480"
SUMMARY = (
    ("attention", "throughput", f"forward, {_MAIN}, 480x848, batch 2"),
    ("attention", "throughput", f"backward, {_MAIN}, batch 1"),
    ("attention", "time", f"norm, rotary and attention, {_MAIN}, batch 2"),
    ("elementwise", "bandwidth", "qk_norm_rope, forward"),
    ("elementwise", "bandwidth", "modulated_norm, forward"),
    ("block", "time", f"block, {_MAIN}, batch 2"),
    ("block", "time", f"block, {_MAIN}, FP8 linear layers, batch 2"),
)
"""Benchmark, metric and name of the rows that README.md shows."""

_COLOURS = ("#c8442b", "#2f6690", "#6a9fb5", "#9fb7c4", "#c3cdd3", "#dcdcd4", "#ece9df")


def load(folder: Path) -> Results:
    """Return the results files of a folder by benchmark."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def write_between_markers(path: Path, text: str) -> None:
    """Put the text between the two markers of a file; raises ValueError if they are not there once each."""
    page = path.read_text()
    if page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} must hold {START} and {END} once each")
    before, rest = page.split(START)
    path.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def summary(results: Results) -> str:
    """Return the table of README.md: ours and the best of the others, by the metrics that a reader asks for first."""
    lines = [["", OURS, "best other", "", "ratio"]]
    for benchmark, metric, name in SUMMARY:
        row = _row(results, benchmark, metric, name)
        others = {
            other: value
            for other, value in row.against.items()
            if not isinstance(value, str) and not other.startswith(OURS)
        }
        best = (min if row.unit == "ms" else max)(others, key=others.__getitem__)
        ratio = others[best] / row.value if row.unit == "ms" else row.value / others[best]
        cells = [name, f"{number(row.value)} {row.unit}", f"{number(others[best])} {row.unit}", best, f"{ratio:.2f}x"]
        lines.append(cells)
    return f"{markdown(lines)}\n\n{_provenance(results['attention'][0])}"


def details(results: Results) -> str:
    """Return the tables of kernels/README.md: every row, by benchmark."""
    parts = []
    for benchmark in ("attention", "elementwise", "block"):
        about, rows = results[benchmark]
        shown = [row for row in rows if row.metric != "intensity"]
        parts.append(f"### benchmarks.{benchmark}\n\n{_provenance(about)}\n\n{tables(shown)}")
    return "\n\n".join(parts)


def _row(results: Results, benchmark: str, metric: str, name: str) -> Row:
    (row,) = (row for row in results[benchmark][1] if (row.metric, row.name) == (metric, name))
    return row


def _provenance(about: Mapping[str, Any]) -> str:
    machine, versions = about["machine"], about["versions"]
    clocks, power = machine["sm_clock_mhz"], machine["power_w"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return (
        f"{machine['gpu']}, driver {machine['driver']}; under load {clocks['median']:.0f} MHz (median, "
        f"{clocks['min']:.0f} to {clocks['max']:.0f}) and at most {power['max']:.0f} W, the limit being "
        f"{machine['power_limit_w']:.0f}; {packages}; commit {about['commit']}, {about['when']}."
    )


def draw_attention(results: Results, path: Path) -> None:
    """Draw attention's forward throughput by size and provider."""
    rows = [
        row
        for row in results["attention"][1]
        if row.metric == "throughput" and row.name.startswith("forward") and "fail" not in row.name
    ]
    figure, axes = plt.subplots(figsize=(11, 4.2))
    labels = [row.name.removeprefix("forward, ").replace(", batch", "\nbatch") for row in rows]
    values = {OURS: [row.value for row in rows]}
    for other in rows[0].against:
        values[other] = [_drawn(row.against[other]) for row in rows]
    width = 0.84 / len(values)
    for i, (provider, heights) in enumerate(values.items()):
        places = [place + (i - (len(values) - 1) / 2) * width for place in range(len(rows))]
        bars = axes.bar(places, heights, width * 0.94, color=_COLOURS[i], label=provider)
        axes.bar_label(bars, labels=[f"{height:.0f}" if height else "-" for height in heights], fontsize=6.5)
    ceiling = rows[0].floor
    if ceiling is not None:
        axes.axhline(ceiling, color="#444444", linewidth=0.8, linestyle="--")
        axes.text(-0.5, ceiling, "large bfloat16 product", va="bottom", fontsize=8, color="#444444")
        axes.set_ylim(0, ceiling * 1.3)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Attention forward, 49 frames, 48 heads of 64, bfloat16, {_gpu(results)}", fontsize=10)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper right")
    _save(figure, axes, path)


def draw_roofline(results: Results, path: Path) -> None:
    """Draw every kernel's FLOP/byte and TFLOP/s under the measured ceilings."""
    figure, axes = plt.subplots(figsize=(9, 5))
    rows = {
        (row.name, row.metric): row for _, measured in results.values() for row in measured if row.metric != "ceiling"
    }
    ceilings = {row.name.split()[0]: row.value for row in results["attention"][1] if row.metric == "ceiling"}
    copy, matmul, matmul_float8 = ceilings["copy"], ceilings["bfloat16"], ceilings["row-wise"]
    ends = (0.5, 3e4)
    for peak, name in ((matmul, "bfloat16 product"), (matmul_float8, "FP8 product")):
        knee = peak / copy
        axes.plot([ends[0], knee, ends[1]], [ends[0] * copy, peak, peak], color="#444444", linewidth=1)
        axes.text(ends[1], peak * 1.05, f"{name}, {number(peak)} TFLOP/s", ha="right", fontsize=8, color="#444444")
    axes.text(20, 20 * copy * 1.4, f"copy, {number(copy)} TB/s", rotation=43, fontsize=8, color="#444444")
    colours = mpl.colormaps["tab20"].colors
    for (name, metric), row in rows.items():
        if metric != "intensity":
            continue
        reached = rows.get((name, "throughput")) or rows[name, "bandwidth"]
        height = reached.value * (row.value if reached.metric == "bandwidth" else 1)
        label = f"attention, {name}" if name.startswith("forward") else name
        share = f"{reached.value / reached.floor:.0%}" if reached.floor else ""
        colour = colours[len(axes.get_legend_handles_labels()[0]) % len(colours)]
        axes.plot(row.value, height, "o", color=colour, markersize=6, label=f"{label}: {share}")
    axes.legend(loc="lower right", fontsize=7, frameon=False, title="share of its ceiling", title_fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {_gpu(results)}, measured ceilings", fontsize=10)
    _save(figure, axes, path)


def draw_block(results: Results, path: Path) -> None:
    """Draw the time of one transformer block by implementation."""
    row = _row(results, "block", "time", f"block, {_MAIN}, batch 2")
    float8 = _row(results, "block", "time", f"block, {_MAIN}, FP8 linear layers, batch 2")
    times = {f"{OURS}, FP8 linear layers": float8.value, OURS: row.value}
    times |= {other: _drawn(value) for other, value in row.against.items()}
    figure, axes = plt.subplots(figsize=(8, 2.6))
    colours = [_COLOURS[0] if name.startswith(OURS) else _COLOURS[2] for name in times]
    bars = axes.barh(list(times), list(times.values()), color=colours)
    axes.bar_label(bars, labels=[f"{time:.1f}" for time in times.values()], padding=3, fontsize=8)
    if row.floor is not None:
        axes.axvline(row.floor, color="#444444", linewidth=0.8, linestyle="--")
        axes.set_title(
            f"One transformer block, {_MAIN}, 49 frames, batch 2, {_gpu(results)} (dashed: bound in bfloat16)",
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    _save(figure, axes, path)


def _drawn(value: float | str) -> float:
    return 0.0 if isinstance(value, str) else value


def _gpu(results: Results) -> str:
    gpu: str = results["attention"][0]["machine"]["gpu"]
    return gpu


def _save(figure: Any, axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    # 256 colours are all that a chart has, and take a third of the bytes.
    with Image.open(path) as chart:
        few = chart.convert("RGB").quantize(256)
    few.save(path, optimize=True)


def main() -> None:
    """Renew the charts in docs/ and the parts between the markers of both pages."""
    mpl.use("Agg")
    results = load(Path(__file__).parent / "results")
    draw_attention(results, ROOT / "docs" / "kernels_attention.png")
    draw_roofline(results, ROOT / "docs" / "kernels_roofline.png")
    draw_block(results, ROOT / "docs" / "kernels_block.png")
    write_between_markers(ROOT / "kernels" / "README.md", details(results))
    write_between_markers(ROOT / "README.md", summary(results))


if __name__ == "__main__":
    main()
