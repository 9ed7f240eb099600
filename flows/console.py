"""How commands speak: tables and progress for a person on stderr and stdout, or one JSON document for a machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    # The command line must answer --help without loading Prefect and Ray.
    from flows.render import Batch

COLOURS: Mapping[str, str] = {
    "ok": "green",
    "rejected": "yellow",
    "failed": "red",
    "dead": "red",
    "cancelled": "magenta",
    "warning": "yellow",
    "missing": "red",
    "absent": "dim",
}

# No markup: what stands in brackets is a row's or a path's own.
out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one document of a --json command."""
    print(json.dumps(document, indent=1, ensure_ascii=False), flush=True)


def print_error(code: str, message: str, numbers: Mapping[str, float], *, as_json: bool) -> None:
    """Print an error a person can act on."""
    if as_json:
        print_json({"error": code, "message": message, "numbers": dict(numbers)})
    else:
        err.print(Text.assemble(("Error", "bold red"), (f" [{code}] ", "red"), message))
        if numbers:
            err.print(Text(", ".join(f"{name} {value:g}" for name, value in numbers.items()), "dim"))


def counts_text(counts: Mapping[str, int]) -> Text:
    """Return "5 ok  1 rejected", leaving out what is zero."""
    text = Text("  ").join(Text(f"{number} {kind}", COLOURS[kind]) for kind, number in counts.items() if number)
    return text or Text("no row has ended", "dim")


def rows_table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Return a table of rows, each with "row_id", "outcome" and "message": where its video is, or why there is none."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("row", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("video, or why there is none", overflow="fold")
    for row in rows:
        table.add_row(row["row_id"], Text(row["outcome"], COLOURS[row["outcome"]]), row["message"])
    return table


def facts_table(facts: Mapping[str, object]) -> Table:
    """Return name-value lines, the names dimmed."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, Text) else str(value))
    return table


class LiveBatch:
    """A Watcher that shows a batch on stderr and turns Ctrl-C into a polite cancel, a second one into an end at once.

    Where stderr is no terminal it prints a line whenever a row has ended; with `quiet`, nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.batch: Batch | None = None
        self.counts: dict[str, int] = {}
        self._quiet = quiet
        self._interrupts = 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[ended]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=err,
            disable=quiet or not err.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, ended="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress and handle Ctrl-C while the block runs."""
        earlier = signal.signal(signal.SIGINT, self._interrupted)
        try:
            with self._progress:
                yield
        finally:
            signal.signal(signal.SIGINT, earlier)

    def started(self, batch: Batch) -> None:
        """Say where the driver is."""
        self.batch = batch
        if not self._quiet:
            self._progress.console.print(f"run {batch.ledger.run_id}: {batch.submission.place}", style="dim")
        self._progress.update(self._task, description="loading the model", total=batch.num_rows)

    def progressed(self, batch: Batch, counts: Mapping[str, int]) -> None:
        """Show the counts, and pass on a Ctrl-C."""
        if self._interrupts and not batch.ledger.cancel_requested():
            batch.ledger.request_cancel()
        done = sum(counts.values())
        changed = dict(counts) != self.counts and done > 0
        self.counts = dict(counts)
        if done:
            self._progress.update(
                self._task,
                description="cancelling" if self._interrupts else "rendering",
                completed=done,
                ended=counts_text(counts).markup,
            )
        if changed and not self._quiet and not err.is_terminal:
            err.print(f"{done} of {batch.num_rows} rows:", counts_text(counts))

    def ended(self, batch: Batch, counts: Mapping[str, int]) -> None:
        """Keep the final counts."""
        self.counts = dict(counts)

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self.batch is None or self._interrupts > 1:
            raise KeyboardInterrupt
        if not self._quiet:
            self._progress.console.print(
                "Cancelling: what is done stays, the rest ends within a step. Ctrl-C again to end at once."
            )
