"""`qcompile merge`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.calibrate import show_calibrated
from qcompile.cli.options import MODEL, as_json
from qcompile.verbs.calibrate import merge_files
from qcompile.verbs.guards import require_place


@click.command("merge")
@click.argument("files", type=MODEL, nargs=-1, required=True)
@click.option("-o", "--output", type=MODEL, required=True, metavar="ALL.qstats", help="The merged statistics.")
@as_json
def command(files: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Merge statistics FILES of disjoint samples.

    The result is bit for bit what one calibration over all samples gives, in whatever order the files come.
    """
    require_place(output, "the statistics file", files)
    show_calibrated(merge_files(files, output), as_json)
