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
from qcompile.verbs.evaluate.outputs import Evaluation, Measure, Score
from qcompile.verbs.evaluate.run import EvalOptions, Evaluated, run
from qcompile.verbs.options import made

WORST_LAYERS = 12
_WRITTEN = {"top1": "top-1", "top5": "top-5", "mae": "MAE", "rmse": "RMSE", "r2": "R2", "mse": "MSE", "auc": "AUC"}


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
    print_table(["", "reference", "candidate"], rows)
    if found.simulated:
        print_text("ONNX Runtime cannot fuse the candidate's Q/DQ pairs: it was simulated, pair by pair")
    for measure in found.tasks:
        _show_measure(measure)
    print_text("", f"samples      {found.samples}")
    if not any(s.name == "agreement" for measure in found.tasks for s in measure.scores):
        print_text(f"agreement    {percent(found.agreement)}")
    print_text(f"SQNR         {number(found.sqnr_db, unit=' dB')}{worst(found.outputs)}")
    show_outputs(found.outputs)
    print_text(f"KL           {number(found.kl, '.3g')}")
    print_text(f"cosine       {number(found.cosine, '.6f')}")
    if found.per_layer is not None:
        _show_layers(found.per_layer)


def _show_measure(found: Measure) -> None:
    """A task's or a metric's figures of both models, the difference, and how sure it is."""
    print_text("", f"{found.title} ({found.why})")
    rows = [_score_row(s) for s in found.scores]
    print_table(["", "reference", "candidate", "difference", "95 % interval", "samples"], rows, right=(1, 2, 3, 4, 5))


def _score_row(s: Score) -> tuple[str, ...]:
    form, unit, scale = (".1f", " %", 100.0) if s.share else (".4g", "", 1.0)
    shown = [number(None if v is None else scale * v, form, unit) for v in (s.reference, s.candidate)]
    signed = "+.2f" if s.share else "+.2g"
    difference, low, high = (None if v is None else scale * v for v in (s.difference, s.low, s.high))
    ends = signed if s.difference is not None else form
    between = "" if low is None else f"{number(low, ends)} .. {number(high, ends)}"
    name = _WRITTEN.get(s.name, s.name)
    return (
        name,
        "" if s.reference is None else shown[0],
        shown[1],
        "" if difference is None else number(difference, signed),
        between,
        str(s.n),
    )


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
