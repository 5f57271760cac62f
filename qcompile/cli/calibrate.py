"""`qcompile calibrate` and `qcompile merge`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from qcompile.cli.compile import DELIVERED, SELECTORS
from qcompile.cli.options import MODEL, Size, as_json, batch_option, range_option
from qcompile.cli.output import megabytes, print_json, print_text
from qcompile.cli.progress import reporter
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.calibrate import Calibrated, calibrate, executor_for, words
from qcompile.verbs.compile.run import DEFAULT_SAMPLES, TARGETS, Options, prepare
from qcompile.verbs.guards import require_place


class Shard(click.ParamType):
    """I/N with 1 <= I <= N."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(I, N)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no shard; write I/N, for example 2/4", param, ctx)
        return int(match[1]), int(match[2])


@click.command("calibrate")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, metavar="STATS.qstats", help="Default here: MODEL.qstats. Continued if it is there.")
@click.option("--calib", metavar="DATA", help="As in compile; default: the data beside MODEL.")
@click.option("--samples", type=click.IntRange(1), help=f"Spread evenly over DATA; default: at most {DEFAULT_SAMPLES}.")
@batch_option
@click.option("--preprocess", metavar="SPEC", help="For pictures: a preset or a TOML file.")
@click.option("--passes", help="The pipeline that will read the statistics; default: the target's.")
@click.option("--target", type=click.Choice(list(TARGETS)), help="Default trt.")
@click.option("--scheme", type=click.Choice(DELIVERED), help="Default w8a8.")
@range_option
@click.option("--keep-float", multiple=True, metavar="SELECTOR", help=f"As in compile: {SELECTORS}. Repeatable.")
@click.option("--only", multiple=True, metavar="SELECTOR", help="As in compile.")
@click.option("--quantize", multiple=True, metavar="SELECTOR", help="As in compile.")
@click.option("--bits", multiple=True, metavar="SELECTOR=wXaY", help="As in compile.")
@click.option("--observers", metavar="KIND,..", help="Instead of what passes ask for: of all activations of MODEL as it is.")
@click.option("--shard", type=Shard(), metavar="I/N", help="Only the I-th of N parts of the samples; join them with merge.")
@click.option("--resume", is_flag=True, help="Fail if there is nothing to continue.")
@click.option("--workers", type=click.IntRange(1), help="Spread the samples over processes here.")
@click.option("--dask", metavar="ADDRESS", help="Spread them over a dask cluster: tcp://host:port, local or local:N.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
@click.option("--mem-limit", type=Size(), metavar="SIZE", help="Of each process; then saved every 1,024 samples only.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads of each process; default: all cores.")
@as_json
def command(  # one argument an option: click's way
    model: Path,
    output: Path | None,
    observers: str | None,
    shard: tuple[int, int] | None,
    resume: bool,
    workers: int | None,
    dask: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Gather the statistics that compiling MODEL asks for, into a file.

    Saved after every batch: the same command goes on where an interrupted one stopped. Then: qcompile MODEL --stats FILE.
    """
    place = output or Path(f"{model.stem}.qstats")
    require_place(place, "the statistics file", [model])
    start = executor_for(workers, dask)
    job = prepare(model, Options(**options))
    kinds = tuple(k.strip() for k in observers.split(",") if k.strip()) if observers else ()
    with reporter() as progress:
        try:
            made = calibrate(job, place, progress, observers=kinds, shard=shard, resume=resume, executor=start)
        except KeyboardInterrupt:
            progress.note(f"what is done is kept in {place}; the same command goes on from there")
            raise
    show_calibrated(made, as_json)


def show_calibrated(made: Calibrated, as_json: bool) -> None:
    """The file, what it holds, and what is missing."""
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, **made.to_json()})
        return
    print_text(f"output       {made.output} ({megabytes(made.output.stat().st_size)})")
    print_text(f"statistics   {made.probes} of {made.sweeps} sweep{'' if made.sweeps == 1 else 's'}, over {made.samples} samples")
    if made.resumed:
        print_text(f"resumed      {made.resumed} samples were there already")
    if made.missing:
        print_text(f"missing      {words(made.missing)}; a compilation needs them: merge the other shards")
    for text in made.warnings:
        print_text(f"note         {text}")
