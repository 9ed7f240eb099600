"""Results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echovideo import results


def test_results_of_an_installed_release_name_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    row = results.Row(name="a", metric="b", value=1.0, unit="s")
    record = json.loads(results.write_results("any", [row], tmp_path, machine="m").read_text())
    assert record["commit"] == "echovideo 0.1.0"
