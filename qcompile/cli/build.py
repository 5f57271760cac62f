"""`qcompile build`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.audit import audit_lines, profile_text
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import megabytes, print_json, print_text
from qcompile.cli.progress import reporter
from qcompile.verbs.build import (
    DEFAULT_GPU,
    BuildOptions,
    EngineResult,
    Hardware,
    engine_targets,
    gpu_list,
    make_engine,
    profiles_from,
    recorded_target,
    require_engine,
)
from qcompile.verbs.guards import require_place

_PROFILE_HELP = (
    "Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max); repeatable: one profile each."
    " Default: from the calibration shapes."
)


@click.command("build")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, required=True, metavar="OUT.engine", help="The engine; its manifest goes beside it.")
@click.option("--target", type=click.Choice(engine_targets()), help="Default: what the model was compiled for, else trt.")
@click.option(
    "--gpu", default=DEFAULT_GPU, show_default=True, metavar="SM,..", help="For rtx; trt builds for this machine's GPU."
)
@click.option("--profile", "profiles", metavar="SHAPES", multiple=True, help=_PROFILE_HELP)
@click.option("--timing-cache", type=MODEL, metavar="FILE", help="Read and updated: later builds are faster (trt).")
@click.option("--version-compatible", is_flag=True, help="Later TensorRT versions load the engine too (trt).")
@click.option(
    "--hardware-compatible",
    type=click.Choice(["ampere+", "same-cc"]),
    help="Run on every GPU from Ampere on, or of the same compute capability (trt).",
)
@click.option("--strip", is_flag=True, help="Leave the weights out; refit them from MODEL before running (needs a GPU).")
@click.option("--refit", is_flag=True, help="Let the weights be exchanged later (needs a GPU).")
@click.option("--no-bisect", is_flag=True, help="If the builder refuses MODEL, do not search for the Q/DQ pairs that break it.")
@as_json
def command(  # one argument an option: click's way
    model: Path,
    output: Path,
    target: str | None,
    gpu: str,
    profiles: tuple[str, ...],
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatible: Hardware | None,
    strip: bool,
    refit: bool,
    no_bisect: bool,
    as_json: bool,
) -> None:
    """Build an engine from MODEL, a Q/DQ model.

    Target rtx needs no GPU, and the engine is audited.
    """
    gpus, shapes = gpu_list(gpu), profiles_from(profiles)
    options = BuildOptions(timing_cache, version_compatible, hardware_compatible, strip, refit)
    chosen = target or recorded_target(model, engine_targets())
    require_place(output, "the engine", [model])
    require_place(timing_cache, "the timing cache", [model, output])
    require_engine(chosen, output, gpus, options=options)
    with reporter() as progress:
        find = not no_bisect
        made = make_engine(
            model,
            output,
            target=chosen,
            gpus=gpus,
            profiles=shapes,
            options=options,
            find_cause=find,
            note=progress.note,
        )
    print_json(made.to_json()) if as_json else show_engine(made)


def show_engine(made: EngineResult) -> None:
    """The engine's file, its profile and the audits."""
    b = made.build
    how = f"built in {b.seconds:.1f} s with {b.manifest['backend']} {b.version}"
    print_text("", f"engine       {b.path} ({megabytes(b.size)}, {how})")
    print_text(f"manifest     {b.manifest_path}")
    for profile in b.profiles:
        print_text(f"profile      {profile_text(profile.to_json())} ({profile.source})")
    for audit in made.audits:
        print_text(*audit_lines(audit.summary()))
