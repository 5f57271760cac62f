"""`qcompile decode`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, print_text
from qcompile.verbs.decode import Decoded, DecodeOptions, decode
from qcompile.verbs.options import made


@click.command("decode", cls=Command)
@click.argument("model", type=MODEL)
@options(DecodeOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Write the runs of several steps of decoding as calibration data.

    MODEL is a decoder with a cache: inputs past..., outputs present....  It runs on prompts of DATA, and then on its own past.
    """
    answer(decode(model, made(DecodeOptions, given)), as_json, show_decoded)


def show_decoded(made: Decoded) -> None:
    """The folder and how many runs it holds."""
    print_text(f"output       {made.output}", f"runs         {made.runs} of {made.prompts} prompts, {made.caches} caches each")
