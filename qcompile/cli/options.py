"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path

import click

MODEL = click.Path(path_type=Path)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Size(click.ParamType):
    """A number of bytes: 4GiB, 500MB, 2000000."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", value.strip().lower())
        if match is None or float(match[1]) == 0:
            self.fail(f"{value!r} is no size; write for example 4GiB or 500MB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or ""])


RANGES = ("minmax", "percentile", "entropy", "mse", "weighted", "search")
range_option = click.option(
    "--range", type=click.Choice(RANGES), help="How activation ranges are found; default: mse for integers, minmax for floats."
)
batch_option = click.option(
    "--batch", type=click.IntRange(1), help="Samples a run of calibration; default: what the model takes, else 8."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else, on standard output.")
profile_option = click.option(
    "--profile", metavar="SHAPES", help="Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max)."
)
