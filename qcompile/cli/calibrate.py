"""`qcompile calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, print_text
from qcompile.cli.progress import reporter
from qcompile.verbs.calibrate.options import CalibrateOptions
from qcompile.verbs.calibrate.run import Calibrated, run
from qcompile.verbs.compile.options import Options
from qcompile.verbs.options import made


@click.command("calibrate", cls=Command)
@click.argument("model", type=MODEL)
@options(CalibrateOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Gather the statistics that compiling MODEL asks for, into a file.

    Saved after every batch: the same command goes on where an interrupted one stopped. Then: qcompile MODEL --stats FILE.
    """
    asked = made(CalibrateOptions, given, model, keys=Options)
    with reporter() as progress:
        gathered = run(model, asked, progress)
    answer(gathered, as_json, show_calibrated)


def show_calibrated(made: Calibrated) -> None:
    """The file, what it holds, and what is missing."""
    print_text(f"output       {made.output} ({megabytes(made.output.stat().st_size)})")
    print_text(f"statistics   {made.probes} of {made.sweeps} sweep{'' if made.sweeps == 1 else 's'}, over {made.samples} samples")
    if made.resumed:
        print_text(f"resumed      {made.resumed} samples were there already")
    if made.missing:
        print_text(f"missing      {made.missing_words}; a compilation needs them: merge the other shards")
    for text in made.warnings:
        print_text(f"note         {text}")
