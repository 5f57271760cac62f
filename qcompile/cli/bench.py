"""`qcompile bench`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, number, print_table, print_text
from qcompile.cli.progress import reporter
from qcompile.verbs.bench.engines import BenchedEngines, bench_engines, is_engine
from qcompile.verbs.bench.models import Benched, BenchOptions, bench
from qcompile.verbs.libraries import load_libraries
from qcompile.verbs.options import made


@click.command("bench", cls=Command)
@click.argument("models", type=MODEL, nargs=-1, required=True)
@options(BenchOptions)
@as_json
def command(models: tuple[Path, ...], given: Mapping[str, Any], as_json: bool) -> None:
    """Time MODELS on ONNX Runtime, or engines on the GPU, interleaved.

    Ratios say how many times as fast as the first model each one is (with engines: give the FP16 engine first).  An
    ONNX model among engines is the reference that their outputs are compared with.
    """
    asked = made(BenchOptions, given)
    load_libraries(asked)
    if any(is_engine(m) for m in models):
        answer(bench_engines(models, runs=asked.runs), as_json, show_engine_bench)
        return
    with reporter() as progress:
        timed = bench(models, threads=asked.threads, runs=asked.runs, progress=progress.on_sweep)
    answer(timed, as_json, show_bench)


def show_bench(timed: Benched) -> None:
    """Latencies, and how many times as fast as the first model."""
    print_table(["model", "median ms", "min ms", "by median", "by min"], _rows(timed), right=(1, 2, 3, 4))
    how = f"batch 1, {timed.threads} threads, {timed.runs} runs a model, interleaved"
    print_text(f"{how}; ratios: times as fast as the first")


def _rows(timed: Benched | BenchedEngines) -> list[tuple[str, ...]]:
    pairs = zip(timed.models, timed.ratios, strict=True)
    return [(m.path, f"{m.median_ms:.3f}", f"{m.min_ms:.3f}", f"{r.median:.2f}x", f"{r.min:.2f}x") for m, r in pairs]


def show_engine_bench(timed: BenchedEngines) -> None:
    """Latencies on the GPU, ratios to the first engine, and the distance from the reference."""
    print_table(["engine", "median ms", "min ms", "by median", "by min"], _rows(timed), right=(1, 2, 3, 4))
    print_text(f"{timed.backend} on {timed.gpu}, {timed.runs} runs an engine, interleaved, without transfers")
    for c in timed.compared:
        d = c.distance
        figures = f"SQNR {number(d.sqnr_db, unit=' dB')}, cosine {d.cosine:.6f}, largest error {d.relative_error:.1e}"
        print_text(f"{c.path} against {c.reference} on ONNX Runtime: {figures}")
