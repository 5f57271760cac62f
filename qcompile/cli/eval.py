"""`qcompile eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.calib.data import load_data
from qcompile.calib.data.checks import check_data
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import number, percent, print_json, print_table, print_text
from qcompile.cli.progress import reporter
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.evaluate.conformance import conformance
from qcompile.verbs.evaluate.outputs import evaluate

WORST_LAYERS = 12


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
def command(
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


def show_evaluation(document: dict[str, Any]) -> None:
    """Both models on the data, their distance, and the worst layers."""
    ref, new = document["reference"], document["candidate"]
    rows = [("path", ref["path"], new["path"]), ("size", f"{ref['size_mb']:.2f} MB", f"{new['size_mb']:.2f} MB")]
    if "top1" in ref:
        rows.append(("top-1", percent(ref["top1"]), percent(new["top1"])))
    rows += [(key, number(ref[key], ".4g"), number(new[key], ".4g")) for key in ("nll", "mse") if key in ref]
    print_table(["", "reference", "candidate"], rows)
    if new.get("simulated"):
        print_text("ONNX Runtime cannot fuse the candidate's Q/DQ pairs: it was simulated, pair by pair")
    print_text("", f"samples      {document['samples']}", f"agreement    {percent(document['agreement'])}")
    print_text(f"SQNR         {number(document['sqnr_db'], unit=' dB')}", f"KL           {number(document['kl'], '.3g')}")
    print_text(f"cosine       {number(document['cosine'], '.6f')}")
    if "per_layer" in document:
        _show_layers(document["per_layer"])
    if "oracle" in document:
        show_conformance(document)


def show_conformance(document: dict[str, Any]) -> None:
    """ONNX Runtime against the integer oracle, a line for each setting."""
    found = document["oracle"]
    rows = [_conformance_row(r) for r in found["runs"]]
    print_table(["optimizations", "threads", "equal", "different", "first sample"], rows, right=(1, 2, 3, 4))
    verdict = "bit for bit equal" if not found["mismatches"] else "DIFFERENT: qcompile check --target integer may say why"
    print_text("", f"oracle       {verdict} on {found['samples']} samples")


def _conformance_row(r: dict[str, Any]) -> tuple[str, ...]:
    first = "" if r["first_sample"] is None else str(r["first_sample"])
    return r["optimize"], str(r["threads"]), str(r["matches"]), str(r["mismatches"]), first


def _show_layers(layers: list[dict[str, Any]]) -> None:
    count = f"{min(WORST_LAYERS, len(layers))} of {len(layers)}"
    print_text("", f"worst layers ({count}; a node far below its inputs is where the error enters)")
    rows = [_layer_row(x) for x in layers[:WORST_LAYERS]]
    print_table(["node", "operator", "SQNR", "its inputs", "note"], rows, right=(2, 3))


def _layer_row(x: dict[str, Any]) -> tuple[str, ...]:
    note = "rescaled by a fold" if x["rescaled"] else ""
    return x["node"], x["op_type"], number(x["sqnr_db"], unit=" dB"), number(x["input_sqnr_db"], unit=" dB"), note
