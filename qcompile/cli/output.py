"""Standard output: one JSON document, or tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompile.report import OutputFigure, escaped, json_text

PLAIN_WIDTH = 118
MOST_OUTPUTS = 8


class Answer(Protocol):
    """What a verb answers: data, and its document."""

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        ...


A = TypeVar("A", bound=Answer)


def answer(result: A, as_json: bool, view: Callable[[A], None]) -> None:
    """The result as its JSON document, or as its view."""
    if as_json:
        print_json(result.to_json())
    else:
        view(result)


def print_json(document: Any) -> None:
    """The document on standard output, with a newline; NaN and infinity become null."""
    click.echo(json_text(document))


def _print(table: Table) -> None:
    """Colours and the real width on a terminal; elsewhere plain text, wide enough for names, without trailing blanks."""
    if sys.stdout.isatty():
        Console(highlight=False, emoji=False).print(table)
        return
    plain = Console(width=PLAIN_WIDTH, highlight=False, emoji=False, color_system=None)
    with plain.capture() as captured:
        plain.print(table)
    print_text(*(line.rstrip() for line in captured.get().splitlines()))


def print_text(*lines: str) -> None:
    """Plain lines; brackets in node names are no markup, and what does not print is escaped."""
    for line in lines:
        click.echo(escaped(line))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, right: Sequence[int] = ()
) -> None:
    """A table of strings; the columns in `right` hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    _print(table)


def number(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """A number for a table: `-` when there is none, `exact` for an infinite SQNR."""
    if value is None or value != value:
        return "-"
    if value == float("inf"):
        return "exact" if unit == " dB" else "inf"
    return f"{value:{form}}{unit}"


def percent(value: float | None) -> str:
    """0.9876 -> `98.8 %`."""
    return "-" if value is None else f"{100 * value:.1f} %"


def flops(value: float) -> str:
    """Operations with a unit."""
    return f"{value / 1e9:.3f} G"


def megabytes(size: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{size / 1e6:.2f} MB"


def worst(outputs: Sequence[OutputFigure]) -> str:
    """Which output a model's SQNR is of, where there are several, and the lowest part that an output hides."""
    measured = [o for o in outputs if o.sqnr_db is not None]
    named = f": {measured[0].name}" if len(outputs) > 1 and measured else ""
    counted = f", the worst of {len(measured)}" if named and len(measured) > 1 else ""
    return f"{named}{counted}{_worst_part(outputs)}"


def _worst_part(outputs: Sequence[OutputFigure]) -> str:
    parts = [(o.parts[0], o.name) for o in outputs if o.parts]
    if not parts:
        return ""
    part, name = min(parts, key=lambda item: item[0].sqnr_db)
    where = part.name if len(outputs) == 1 else f"{part.name} of {name}"
    return f"; its part {where}: {number(part.sqnr_db, unit=' dB')}"


def show_outputs(outputs: Sequence[OutputFigure]) -> None:
    """A line for each output where there are several, or where the only one has no figure in dB."""
    if len(outputs) == 1 and outputs[0].sqnr_db is not None and not outputs[0].note and not outputs[0].parts:
        return
    for o in outputs[:MOST_OUTPUTS]:
        figure = number(o.sqnr_db, unit=" dB") if o.equal is None else f"{percent(o.equal)} of entries equal"
        print_text(f"             {o.name}: {figure}{f', {o.note}' if o.note else ''}")
        for part in o.parts[:MOST_OUTPUTS]:
            print_text(f"               part {part.name}: {number(part.sqnr_db, unit=' dB')}")
    if len(outputs) > MOST_OUTPUTS:
        print_text(f"             and {len(outputs) - MOST_OUTPUTS} more (--json, or --report)")
