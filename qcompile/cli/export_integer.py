"""`qcompile export-integer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import megabytes, print_json, print_text
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.export_integer import export_file


@click.command("export-integer")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, metavar="OUT.json", help="Default: MODEL with the suffix .json.")
@as_json
def command(model: Path, output: Path | None, as_json: bool) -> None:
    """Write an integer-only MODEL as JSON: weights, multipliers, shifts, zero points, tables.

    For firmware, FPGA and compilers: every layer with its constants, in the form that docs/guide/integer.md describes.
    """
    document = export_file(model, output or model.with_suffix(".json"))
    print_json({"schema_version": SCHEMA_VERSION, **document}) if as_json else show_export(document)


def show_export(document: dict[str, Any]) -> None:
    """The file and how many layers of each kind it holds."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in document["layers"].items())
    print_text(f"output       {document['output']} ({megabytes(document['bytes'])})", f"layers       {kinds}")
    print_text(f"interface    {', '.join(document['inputs'])} -> {', '.join(document['outputs'])}")
