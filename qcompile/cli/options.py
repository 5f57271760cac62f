"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

MODEL = click.Path(path_type=Path)
ENGINES = click.Choice(["rtx", "trt"])
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else, on standard output.")
profile_option = click.option(
    "--profile", metavar="SHAPES", help="Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max)."
)
