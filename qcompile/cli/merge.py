"""`qcompile merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.calibrate import show_calibrated
from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer
from qcompile.verbs.calibrate.options import MergeOptions
from qcompile.verbs.calibrate.run import merge_files
from qcompile.verbs.options import made


@click.command("merge", cls=Command)
@click.argument("files", type=MODEL, nargs=-1, required=True)
@options(MergeOptions)
@as_json
def command(files: tuple[Path, ...], given: Mapping[str, Any], as_json: bool) -> None:
    """Merge statistics FILES of disjoint samples.

    The result is bit for bit what one calibration over all samples gives, in whatever order the files come.
    """
    answer(merge_files(files, made(MergeOptions, given).output), as_json, show_calibrated)
