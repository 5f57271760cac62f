"""`qcompile refit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, print_text
from qcompile.verbs.build import RefitOptions, Refitted, refit
from qcompile.verbs.options import made


@click.command("refit", cls=Command)
@click.argument("engine", type=MODEL)
@options(RefitOptions)
@as_json
def command(engine: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Give ENGINE the weights of an ONNX model.

    ENGINE was built with --strip or --refit, from a model of the same structure. Needs the GPU that it runs on.
    """
    answer(refit(engine, made(RefitOptions, given)), as_json, show_refitted)


def show_refitted(made: Refitted) -> None:
    """The engine and its manifest."""
    print_text(f"engine       {made.engine} ({megabytes(made.engine.stat().st_size)}, weights of {made.weights})")
    print_text(f"manifest     {made.manifest}")
