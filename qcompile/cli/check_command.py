"""`qcompile check`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import print_json
from qcompile.cli.views import show_findings
from qcompile.engine import check_document, gpu_list, recorded_target
from qcompile.target.rules import RULES


@click.command("check")
@click.argument("model", type=MODEL)
@click.option("--target", type=click.Choice(list(RULES)), help="Default: what the model was compiled for, else trt.")
@click.option("--gpu", metavar="SM,..", help="Also check what these GPUs can compute, e.g. sm86,sm89.")
@as_json
def check_command(model: Path, target: str | None, gpu: str | None, as_json: bool) -> None:
    """Check MODEL against a target's rules.

    Exit code 1 on errors: what the backend refuses, or silently runs in float.
    """
    document = check_document(model, target or recorded_target(model, RULES), gpu_list(gpu) if gpu else ())
    print_json(document) if as_json else show_findings(document)
    if document["errors"]:
        click.get_current_context().exit(1)
