"""What commands print."""

from __future__ import annotations

import pytest

from flows.console import facts_table, out, rows_table


def test_tables_show_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    out.print(facts_table({"report": "/renders[final]/report.html"}))
    out.print(rows_table([{"row_id": "a", "outcome": "rejected", "message": "size '[/b]' is unknown"}]))
    shown = capsys.readouterr().out
    assert "/renders[final]/report.html" in shown
    assert "size '[/b]' is unknown" in shown
