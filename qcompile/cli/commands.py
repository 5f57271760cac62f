"""All commands but `compile`: each calls one function and shows its document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.benchmark import DEFAULT_RUNS, bench
from qcompile.calib.data import load_data
from qcompile.cli.catalog import show_inspection, show_pass, show_passes
from qcompile.cli.output import print_json
from qcompile.cli.progress import reporter
from qcompile.cli.views import show_audit, show_bench, show_engine, show_evaluation, show_findings
from qcompile.engine import (
    DEFAULT_GPU,
    audit,
    check_document,
    gpu_list,
    make_engine,
    profile_from,
    recorded_target,
    require_engine,
)
from qcompile.errors import GateError
from qcompile.evaluate import evaluate
from qcompile.inspection import inspect_model
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.describe import describe_pass, describe_passes
from qcompile.report import SCHEMA_VERSION
from qcompile.target.rules import RULES

MODEL = click.Path(path_type=Path)
ENGINES = click.Choice(["rtx", "trt"])
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else, on standard output.")
profile_option = click.option(
    "--profile", metavar="SHAPES", help="Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max)."
)


@click.command("eval")
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL)
@click.option("--data", required=True, metavar="DATA", help="As --calib of compile; labels give top-1.")
@click.option("--preprocess", metavar="SPEC", help="For pictures: a preset or a TOML file.")
@click.option("--samples", type=click.IntRange(1), help="Default: all.")
@click.option("--per-layer", is_flag=True, help="Also compare every tensor that both graphs name, worst first.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads; default: all cores.")
@as_json
def eval_command(
    reference: Path,
    candidate: Path,
    data: str,
    preprocess: str | None,
    samples: int | None,
    per_layer: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare CANDIDATE with its float REFERENCE on data."""
    dataset = load_data(data, Model.load(reference).inputs(), preprocess, samples)
    with reporter() as progress:
        document = evaluate(reference, candidate, dataset, per_layer=per_layer, threads=threads, progress=progress.on_sweep)
    print_json(document) if as_json else show_evaluation(document)


@click.command("bench")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="ONNX Runtime threads.")
@click.option("--runs", type=click.IntRange(1), default=DEFAULT_RUNS, show_default=True, help="Timed runs of each model.")
@as_json
def bench_command(models: tuple[Path, ...], threads: int, runs: int, as_json: bool) -> None:
    """Time MODELS on ONNX Runtime, interleaved.

    Ratios say how many times as fast as the first model each one is.
    """
    with reporter() as progress:
        document = bench(models, threads=threads, runs=runs, progress=progress.on_sweep)
    print_json(document) if as_json else show_bench(document)


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


@click.command("inspect")
@click.argument("model", type=MODEL)
@as_json
def inspect_command(model: Path, as_json: bool) -> None:
    """Show what is in MODEL.

    Interface, operators, structures, what qcompile wrote, and the quantized tensors with their scales.
    """
    document = inspect_model(model)
    print_json(document) if as_json else show_inspection(document)


@click.command("passes")
@click.argument("name", required=False)
@as_json
def passes_command(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options."""
    if name is None:
        document = _passes_document()
        print_json(document) if as_json else show_passes(document)
        return
    described = describe_pass(name)
    print_json({"schema_version": SCHEMA_VERSION, **described.to_json()}) if as_json else show_pass(described)


def _passes_document() -> dict[str, Any]:
    passes = [p.to_json() for p in describe_passes()]
    presets = {"presets": dict(registry.PRESETS), "defaults": dict(registry.DEFAULTS)}
    return {"schema_version": SCHEMA_VERSION, "passes": passes, **presets}


COMMANDS = (eval_command, bench_command, check_command, audit_command, build_command, inspect_command, passes_command)
