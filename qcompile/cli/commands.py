"""The commands, and those with a line or two of code: each calls one function and shows its document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.calib.data.checks import check_data
from qcompile.calib.data.dataset import load_data
from qcompile.cli.audit_command import audit_command
from qcompile.cli.bench_command import bench_command
from qcompile.cli.build_command import build_command
from qcompile.cli.calibrate_command import calibrate_command, merge_command
from qcompile.cli.catalog import show_inspection, show_pass, show_passes
from qcompile.cli.check_command import check_command
from qcompile.cli.deploy_command import deploy_command
from qcompile.cli.export_command import export_command
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import print_json
from qcompile.cli.progress import reporter
from qcompile.cli.views import show_conformance, show_evaluation
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.describe import describe_pass, describe_passes
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.evaluate.conformance import conformance
from qcompile.verbs.evaluate.outputs import evaluate
from qcompile.verbs.inspect import inspect


@click.command("eval")
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL, required=False)
@click.option("--data", required=True, metavar="DATA", help="As --calib of compile; labels give top-1.")
@click.option("--preprocess", metavar="SPEC", help="For pictures: a preset or a TOML file.")
@click.option("--samples", type=click.IntRange(1), help="Default: all.")
@click.option("--per-layer", is_flag=True, help="Also compare every tensor that both graphs name, worst first.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads; default: all cores.")
@click.option("--oracle", is_flag=True, help="Integer-only models: is ONNX Runtime bit for bit what integer arithmetic gives?")
@as_json
def eval_command(
    reference: Path,
    candidate: Path | None,
    data: str,
    preprocess: str | None,
    samples: int | None,
    per_layer: bool,
    threads: int | None,
    oracle: bool,
    as_json: bool,
) -> None:
    """Compare CANDIDATE with its float REFERENCE on data.

    With --oracle an integer-only model (CANDIDATE, or the only MODEL) is also compared with the integer oracle, with
    optimizations off, basic and all, on 1 and 2 threads; a mismatch is exit code 1.
    """
    if candidate is None and not oracle:
        raise UsageError("eval compares two models; give REFERENCE and CANDIDATE (or --oracle and one integer-only model)")
    inputs = Model.load(reference).inputs()
    dataset = load_data(data, inputs, preprocess, samples)
    document: dict[str, Any] = {}
    with reporter() as progress:
        warnings = check_data(dataset, inputs, preprocess)
        for text in warnings:
            progress.note(f"warning: {text}")
        if candidate is not None:
            document = evaluate(reference, candidate, dataset, per_layer=per_layer, threads=threads, progress=progress.on_sweep)
        if oracle:
            document["oracle"] = conformance(candidate or reference, dataset, threads=threads, progress=progress.on_sweep)
    document["notes"] = warnings
    show = show_evaluation if candidate is not None else show_conformance
    print_json({"schema_version": SCHEMA_VERSION, **document}) if as_json else show(document)
    if oracle and document["oracle"]["mismatches"]:
        click.get_current_context().exit(1)


@click.command("inspect")
@click.argument("model", type=MODEL)
@click.option("--audit", "audit_file", type=MODEL, metavar="RESULT.json", help="What audit --json printed: plan beside kernels.")
@click.option("--gpu", metavar="SM", help="Audit MODEL now for this GPU, e.g. sm89; none is needed here.")
@click.option("--remarks", "remarks_file", type=MODEL, metavar="OUT.json", help="What compile --remarks wrote: why float.")
@as_json
def inspect_command(model: Path, audit_file: Path | None, gpu: str | None, remarks_file: Path | None, as_json: bool) -> None:
    """Show what is in MODEL, an ONNX model or an engine.

    Interface, operators, structures, what qcompile wrote, the quantized tensors with their scales, and the precision of
    every GEMM, convolution and attention product.  Of an engine: what its manifest says, and whether it is true.
    """
    document = inspect(model, audit_file=audit_file, gpu=gpu, remarks_file=remarks_file)
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


COMMANDS = (
    eval_command,
    bench_command,
    check_command,
    audit_command,
    build_command,
    deploy_command,
    export_command,
    inspect_command,
    passes_command,
    calibrate_command,
    merge_command,
)
