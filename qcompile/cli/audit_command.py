"""`qcompile audit`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.options import ENGINES, MODEL, as_json, profile_option
from qcompile.cli.output import print_json
from qcompile.cli.views import show_audit
from qcompile.errors import GateError
from qcompile.verbs.build import DEFAULT_GPU, audit, gpu_list, profile_from


@click.command("audit")
@click.argument("model", type=MODEL)
@click.option("--gpu", default=DEFAULT_GPU, show_default=True, metavar="SM", help="The GPU to build for; none is needed here.")
@click.option("--target", type=ENGINES, default="rtx", show_default=True, help="trt needs the tensorrt package and a GPU.")
@profile_option
@click.option("--min-share", type=click.FloatRange(0, 1), metavar="X", help="Fail (exit 1) if the share is lower.")
@as_json
def audit_command(model: Path, gpu: str, target: str, profile: str | None, min_share: float | None, as_json: bool) -> None:
    """Show which kernels MODEL really gets.

    Builds with TensorRT-RTX and reads which GEMMs and convolutions became low-precision kernels; nothing is run.
    """
    result = audit(model, gpu_list(gpu)[0], profile_from(profile), target)
    document = result.to_json()
    print_json(document) if as_json else show_audit(document)
    share = document["share"]
    if min_share is not None and (share is None or share < min_share):
        raise GateError(f"the share is {share}, below --min-share {min_share}; look at the nodes that run in float, or lower it")
