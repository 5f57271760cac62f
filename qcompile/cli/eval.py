"""`qcompile eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, number, percent, print_table, print_text, show_outputs, worst
from qcompile.cli.progress import reporter
from qcompile.verbs.evaluate.conformance import Conformance, OracleRun
from qcompile.verbs.evaluate.layers import LayerError
from qcompile.verbs.evaluate.outputs import Evaluation
from qcompile.verbs.evaluate.run import EvalOptions, Evaluated, run
from qcompile.verbs.options import made

WORST_LAYERS = 12


@click.command("eval", cls=Command)
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL, required=False)
@options(EvalOptions)
@as_json
def command(reference: Path, candidate: Path | None, given: Mapping[str, Any], as_json: bool) -> None:
    """Compare CANDIDATE with its float REFERENCE on data.

    With --oracle an integer-only model (CANDIDATE, or the only MODEL) is also compared with the integer oracle, with
    optimizations off, basic and all, on 1 and 2 threads; a mismatch is exit code 1.
    """
    with reporter() as progress:
        found = run(reference, candidate, made(EvalOptions, given), progress)
    answer(found, as_json, show_evaluated)
    if found.mismatches:
        click.get_current_context().exit(1)


def show_evaluated(found: Evaluated) -> None:
    """Both models on the data, and the oracle's verdict."""
    if found.comparison is not None:
        show_evaluation(found.comparison)
    if found.oracle is not None:
        show_conformance(found.oracle)


def show_evaluation(found: Evaluation) -> None:
    """Both models on the data, their distance, and the worst layers."""
    ref, new = found.reference, found.candidate
    rows = [("path", str(ref.path), str(new.path)), ("size", f"{ref.size_mb:.2f} MB", f"{new.size_mb:.2f} MB")]
    rows += [_metric_row(name, value, new.metrics[name]) for name, value in ref.metrics.items()]
    print_table(["", "reference", "candidate"], rows)
    if found.simulated:
        print_text("ONNX Runtime cannot fuse the candidate's Q/DQ pairs: it was simulated, pair by pair")
    print_text("", f"samples      {found.samples}", f"agreement    {percent(found.agreement)}")
    print_text(f"SQNR         {number(found.sqnr_db, unit=' dB')}{worst(found.outputs)}")
    show_outputs(found.outputs)
    print_text(f"KL           {number(found.kl, '.3g')}")
    print_text(f"cosine       {number(found.cosine, '.6f')}")
    if found.per_layer is not None:
        _show_layers(found.per_layer)


def _metric_row(name: str, reference: float, candidate: float) -> tuple[str, str, str]:
    if name == "top1":
        return "top-1", percent(reference), percent(candidate)
    return name, number(reference, ".4g"), number(candidate, ".4g")


def show_conformance(found: Conformance) -> None:
    """ONNX Runtime against the integer oracle, a line for each setting."""
    rows = [_conformance_row(r) for r in found.runs]
    print_table(["optimizations", "threads", "equal", "different", "first sample"], rows, right=(1, 2, 3, 4))
    verdict = "bit for bit equal" if not found.mismatches else "DIFFERENT: qcompile check --target integer may say why"
    print_text("", f"oracle       {verdict} on {found.samples} samples")


def _conformance_row(r: OracleRun) -> tuple[str, ...]:
    first = "" if r.first_sample is None else str(r.first_sample)
    return r.optimize, str(r.threads), str(r.matches), str(r.mismatches), first


def _show_layers(layers: Sequence[LayerError]) -> None:
    count = f"{min(WORST_LAYERS, len(layers))} of {len(layers)}"
    print_text("", f"worst layers ({count}; a node far below its inputs is where the error enters)")
    rows = [_layer_row(x) for x in layers[:WORST_LAYERS]]
    print_table(["node", "operator", "SQNR", "its inputs", "note"], rows, right=(2, 3))


def _layer_row(x: LayerError) -> tuple[str, ...]:
    note = "rescaled by a fold" if x.rescaled else ""
    return x.node, x.op_type, number(x.sqnr_db, unit=" dB"), number(x.input_sqnr_db, unit=" dB"), note
