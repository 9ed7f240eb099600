"""What the benchmarks make of a results file: tables, the best of the others, and the pages' parts between markers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plot, tune
from benchmarks.common import Row, read, tables
from echovideo_kernels import dispatch


def test_tables_rates_and_times_give_their_share_of_the_bound() -> None:
    rows = [
        Row(name="long", metric="throughput", value=600.0, unit="TFLOP/s", floor=800.0, against={"cuDNN": 415.25}),
        Row(name="long", metric="time", value=20.0, unit="ms", floor=15.0, against={"cuDNN": 25.0}),
    ]
    assert tables(rows).splitlines() == [
        "| throughput, TFLOP/s | EchoVideo | cuDNN | bound | share of it |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| long | 600 | 415 | 800 | 75% |",
        "",
        "| time, ms | EchoVideo | cuDNN | bound | share of it |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| long | 20.0 | 25.0 | 15.0 | 75% |",
    ]


def test_tables_missing_number_is_a_dash_with_its_reason_below() -> None:
    rows = [
        Row(name=name, metric="relative error", value=0.00234, unit="", against={"A": "ImportError: no A", "B": 0.1})
        for name in ("short", "long")
    ]
    assert tables(rows).splitlines()[2:] == [
        "| short | 2.34e-03 | - | 0.100 |",
        "| long | 2.34e-03 | - | 0.100 |",
        "",
        "A: ImportError: no A",
    ]


def results_folder(folder: Path, rates: dict[str, Any], times: dict[str, Any]) -> Path:
    """A results file for each benchmark of the summary, ours at 600 or 20 in each row."""
    machine = {"gpu": "GPU", "driver": "1", "power_limit_w": 700.0}
    machine |= {"power_w": {"max": 690.0}, "sm_clock_mhz": {"min": 1300.0, "median": 1755.0, "max": 1980.0}}
    by_benchmark: dict[str, list[Row]] = {}
    for benchmark, metric, name in plot.SUMMARY:
        timed = metric == "time"
        row = Row(
            name=name,
            metric=metric,
            value=20.0 if timed else 600.0,
            unit="ms" if timed else "TFLOP/s",
            against=times if timed else rates,
        )
        by_benchmark.setdefault(benchmark, []).append(row)
    for benchmark, rows in by_benchmark.items():
        about = {
            "benchmark": benchmark,
            "machine": machine,
            "versions": {"torch": "2"},
            "commit": "c0ffee",
            "when": "now",
        }
        (folder / f"{benchmark}.json").write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}))
    return folder


def test_summary_compares_with_the_best_of_the_others(tmp_path: Path) -> None:
    folder = results_folder(
        tmp_path,
        {"slow": 300.0, "fast": 500.0, "gone": "ImportError: gone", "EchoVideo, otherwise": 900.0},
        {"slow": 50.0, "fast": 25.0, "EchoVideo, otherwise": 1.0},
    )
    lines = plot.summary(plot.load(folder)).splitlines()
    assert "| forward, 848x480, 480x848, batch 2 | 600 TFLOP/s | 500 TFLOP/s | fast | 1.20x |" in lines
    assert "| block, 848x480, batch 2 | 20.0 ms | 25.0 ms | fast | 1.25x |" in lines
    assert lines[-1].startswith("GPU, driver 1; under load 1755 MHz")
    assert "commit c0ffee" in lines[-1]


def test_read_results_file_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    about, rows = read(results_folder(tmp_path, {"a": 1.5}, {"a": "no"}) / "elementwise.json")
    assert about["commit"] == "c0ffee"
    assert [(row.metric, row.value, row.against) for row in rows] == [("bandwidth", 600.0, {"a": 1.5})] * 2


def test_write_between_markers_replaces_only_what_is_between(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{plot.START}\nold\n{plot.END}\nafter\n")
    plot.write_between_markers(page, "new")
    assert page.read_text() == f"before\n{plot.START}\nnew\n{plot.END}\nafter\n"


def test_write_between_markers_page_without_them_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{plot.START} alone\n")
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        plot.write_between_markers(page, "new")
    assert page.read_text() == f"{plot.START} alone\n"


@pytest.mark.parametrize("path", sorted(Path(plot.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_benchmark_command_runs_once_all_is_defined(path: Path) -> None:
    lines = path.read_text().splitlines()
    if 'if __name__ == "__main__":' in lines:
        assert lines[-2] == 'if __name__ == "__main__":'


def test_tune_leaves_what_it_does_not_tune_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")

    def run(_: str, measure: Any) -> Path:
        measure.args[0]["attention"] = {"from_tokens": 1, "stages": 2}
        return tmp_path

    monkeypatch.setattr(tune, "run", run)
    tune.main()
    (chip,) = json.loads((tmp_path / "tuned.json").read_text()).values()
    before = dispatch.table()["sm_90"]["operators"]
    assert chip["measured_on"] == "another"
    assert chip["operators"] == {**before, "attention": {"from_tokens": 1, "stages": 2}}
