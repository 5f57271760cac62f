"""`qcompile build`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.options import ENGINES, MODEL, as_json, profile_option
from qcompile.cli.output import print_json
from qcompile.cli.progress import reporter
from qcompile.cli.views import show_engine
from qcompile.engine import DEFAULT_GPU, gpu_list, make_engine, profile_from, recorded_target, require_engine


@click.command("build")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, required=True, metavar="OUT.engine", help="The engine; its manifest goes beside it.")
@click.option("--target", type=ENGINES, help="Default: what the model was compiled for, else trt.")
@click.option(
    "--gpu", default=DEFAULT_GPU, show_default=True, metavar="SM,..", help="For rtx; trt builds for this machine's GPU."
)
@profile_option
@as_json
def build_command(model: Path, output: Path, target: str | None, gpu: str, profile: str | None, as_json: bool) -> None:
    """Build an engine from MODEL, a Q/DQ model.

    Target rtx needs no GPU, and the engine is audited.
    """
    chosen, gpus = target or recorded_target(model, ("rtx", "trt")), gpu_list(gpu)
    require_engine(chosen, output, gpus)
    with reporter() as progress:
        made = make_engine(model, output, target=chosen, gpus=gpus, profile=profile_from(profile), note=progress.note)
    print_json(made.to_json()) if as_json else show_engine(made)
