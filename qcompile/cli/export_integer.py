"""`qcompile export-integer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, print_text
from qcompile.verbs.export_integer import Exported, ExportOptions, export_file
from qcompile.verbs.options import made


@click.command("export-integer", cls=Command)
@click.argument("model", type=MODEL)
@options(ExportOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Write an integer-only MODEL as JSON: weights, multipliers, shifts, zero points, tables.

    For firmware, FPGA and compilers: every layer with its constants, in the form that docs/guide/integer.md describes.
    """
    output = made(ExportOptions, given).output
    answer(export_file(model, output or model.with_suffix(".json")), as_json, show_export)


def show_export(made: Exported) -> None:
    """The file and how many layers of each kind it holds."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.layers.items())
    print_text(f"output       {made.output} ({megabytes(made.bytes)})", f"layers       {kinds}")
    print_text(f"interface    {', '.join(made.inputs)} -> {', '.join(made.outputs)}")
