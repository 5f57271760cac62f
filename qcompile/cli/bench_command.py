"""`qcompile bench`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import print_json
from qcompile.cli.progress import reporter
from qcompile.cli.views import show_bench, show_engine_bench
from qcompile.verbs.bench.engines import bench_engines, is_engine
from qcompile.verbs.bench.models import DEFAULT_RUNS, bench


@click.command("bench")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="ONNX Runtime threads.")
@click.option("--runs", type=click.IntRange(1), default=DEFAULT_RUNS, show_default=True, help="Timed runs of each model.")
@as_json
def bench_command(models: tuple[Path, ...], threads: int, runs: int, as_json: bool) -> None:
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
