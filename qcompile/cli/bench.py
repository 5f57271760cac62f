"""`qcompile bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import number, print_json, print_table, print_text
from qcompile.cli.progress import reporter
from qcompile.verbs.bench.engines import bench_engines, is_engine
from qcompile.verbs.bench.models import DEFAULT_RUNS, bench


@click.command("bench")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="ONNX Runtime threads.")
@click.option("--runs", type=click.IntRange(1), default=DEFAULT_RUNS, show_default=True, help="Timed runs of each model.")
@as_json
def command(models: tuple[Path, ...], threads: int, runs: int, as_json: bool) -> None:
    """Time MODELS on ONNX Runtime, or engines on the GPU, interleaved.

    Ratios say how many times as fast as the first model each one is (with engines: give the FP16 engine first).  An
    ONNX model among engines is the reference that their outputs are compared with.
    """
    if any(is_engine(m) for m in models):
        document = bench_engines(models, runs=runs)
        print_json(document) if as_json else show_engine_bench(document)
        return
    with reporter() as progress:
        document = bench(models, threads=threads, runs=runs, progress=progress.on_sweep)
    print_json(document) if as_json else show_bench(document)


def show_bench(document: dict[str, Any]) -> None:
    """Latencies, and how many times as fast as the first model."""
    rows = [_bench_row(m, r) for m, r in zip(document["models"], document["ratios"], strict=True)]
    print_table(["model", "median ms", "min ms", "by median", "by min"], rows, right=(1, 2, 3, 4))
    how = f"batch 1, {document['threads']} threads, {document['runs']} runs a model, interleaved"
    print_text(f"{how}; ratios: times as fast as the first")


def _bench_row(m: dict[str, Any], r: dict[str, Any]) -> tuple[str, ...]:
    return m["path"], f"{m['median_ms']:.3f}", f"{m['min_ms']:.3f}", f"{r['median']:.2f}x", f"{r['min']:.2f}x"


def show_engine_bench(document: dict[str, Any]) -> None:
    """Latencies on the GPU, ratios to the first engine, and the distance from the reference."""
    rows = [_bench_row(m, r) for m, r in zip(document["models"], document["ratios"], strict=True)]
    print_table(["engine", "median ms", "min ms", "by median", "by min"], rows, right=(1, 2, 3, 4))
    print_text(f"{document['backend']} on {document['gpu']}, {document['runs']} runs an engine, interleaved, without transfers")
    for c in document["compared"]:
        figures = f"SQNR {number(c['sqnr_db'], unit=' dB')}, cosine {c['cosine']:.6f}, largest error {c['relative_error']:.1e}"
        print_text(f"{c['path']} against {c['reference']} on ONNX Runtime: {figures}")
