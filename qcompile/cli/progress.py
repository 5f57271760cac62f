"""Progress on standard error: bars on a terminal, short lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from qcompile.report import PassReport, escaped

EVERY_SECONDS = 10


def tally(report: PassReport) -> str:
    """`12 applied, 3 missed`, or what is known without remarks."""
    counts = {kind: sum(r.kind == kind for r in report.remarks) for kind in ("applied", "missed")}
    words = [f"{n} {kind}" for kind, n in counts.items() if n]
    if not report.modified:
        words = ["no change", *words]
    return ", ".join(words) or "changed"


class Reporter:
    """Says where the work is, one short line a step; safe for logs."""

    def __init__(self) -> None:
        self._index = self._total = 0
        self._told = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def on_pass(self, spec: str, index: int, total: int) -> None:
        """A pass begins."""
        self._index, self._total = index + 1, total

    def on_done(self, report: PassReport) -> None:
        """A pass has ended."""
        self.note(f"[{self._index}/{self._total}] {report.spec}: {tally(report)}, {report.seconds:.1f} s")

    def on_sweep(self, done: int, total: int) -> None:
        """Samples (or runs) done within the current step: a line now and then."""
        if time.monotonic() - self._told > EVERY_SECONDS:
            self._told = time.monotonic()
            self.note(f"{done} of {total} samples")

    def note(self, message: str) -> None:
        """One line for the user."""
        sys.stderr.write(escaped(f"{message}\n", keep="\n"))
        sys.stderr.flush()


class BarReporter(Reporter):
    """A bar over the passes, and one over the samples of the sweep that runs."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True)
        self._passes: TaskID | None = None
        self._sweep: TaskID | None = None

    def __enter__(self) -> BarReporter:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def on_pass(self, spec: str, index: int, total: int) -> None:
        """Advance the outer bar."""
        if self._passes is None:
            self._passes = self._bars.add_task("", total=total)
        self._bars.update(self._passes, description=escape(spec), completed=index, total=total)

    def on_done(self, report: PassReport) -> None:
        """Advance the outer bar; the table at the end says what happened."""
        if self._passes is not None:
            self._bars.advance(self._passes)
        self._drop_sweep()

    def on_sweep(self, done: int, total: int) -> None:
        """Advance the inner bar."""
        if self._sweep is None:
            self._sweep = self._bars.add_task("samples", total=total)
        self._bars.update(self._sweep, completed=done, total=total)
        if done >= total:
            self._drop_sweep()

    def note(self, message: str) -> None:
        """A line above the bars."""
        self._bars.console.print(escaped(message, keep="\n"), markup=False, highlight=False)

    def _drop_sweep(self) -> None:
        if self._sweep is not None:
            self._bars.remove_task(self._sweep)
            self._sweep = None


def reporter() -> Reporter:
    """Bars when standard error is a terminal, lines otherwise."""
    console = Console(stderr=True)
    return BarReporter(console) if console.is_terminal else Reporter()
