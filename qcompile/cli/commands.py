"""The commands, and those with a line or two of code: each calls one function and shows its document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.benchmark import DEFAULT_RUNS, bench
from qcompile.calib.data import load_data
from qcompile.cli.audit_command import audit_command
from qcompile.cli.build_command import build_command
from qcompile.cli.catalog import show_inspection, show_pass, show_passes
from qcompile.cli.check_command import check_command
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import print_json
from qcompile.cli.progress import reporter
from qcompile.cli.views import show_bench, show_evaluation
from qcompile.evaluate import evaluate
from qcompile.inspection import inspect_model
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.describe import describe_pass, describe_passes
from qcompile.report import SCHEMA_VERSION


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
