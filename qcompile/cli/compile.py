"""`qcompile MODEL`: the default command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.build import show_engine
from qcompile.cli.check import cost_line
from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, number, print_table, print_text, show_outputs, worst
from qcompile.cli.progress import reporter, tally
from qcompile.report import PassReport
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.plan import DryRun, MemoryPlan, Rehearsal, dry_run
from qcompile.verbs.compile.run import Result, run
from qcompile.verbs.options import made


@click.command("compile", cls=Command)
@click.argument("model", type=MODEL)
@options(Options)
@click.option("--dry-run", "dry", is_flag=True, help="Print the completed pipeline and the sweeps it needs; write nothing.")
@as_json
def command(model: Path, given: Mapping[str, Any], dry: bool, as_json: bool) -> None:
    """Quantize MODEL (the default command).

    Runs the passes, verifies each, writes a Q/DQ model, and an engine if asked.  What is not said here is taken from
    MODEL.qcompile.toml, if there is one: keys as the options below.
    """
    job = prepare(model, made(Options, given, model))
    if dry:
        answer(dry_run(job), as_json, show_plan)
        return
    with reporter() as progress:
        result = run(job, progress)
    answer(result, as_json, show_result)


def show_plan(plan: DryRun) -> None:
    """`--dry-run`: the pipeline, its passes, the data and the sweeps."""
    print_text(plan.pipeline, "")
    chosen = "default" if plan.default else "you"
    print_table(["pass", "from", "what"], [(p.spec, "inserted" if p.inserted else chosen, p.help) for p in plan.passes])
    print_text("", f"output       {plan.output}", f"calibration  {plan.calibration}")
    print_text(f"sweeps       {_sweeps_line(plan.rehearsal)}")
    if plan.rehearsal.memory is not None:
        print_text(f"memory       {_memory_line(plan.rehearsal.memory, plan.mem_limit)}")


def _sweeps_line(rehearsal: Rehearsal) -> str:
    """How often the data is gone over, and by which passes, which share a sweep with those behind them."""
    if not rehearsal.sweeps:
        return "none"
    return f"{len(rehearsal.sweeps)} ({', '.join(rehearsal.sweeps)}), rehearsed on {rehearsal.samples} samples"


def _memory_line(plan: MemoryPlan, limit: int | None) -> str:
    """The predicted peak of the first sweep, and what it is tiled into."""
    blocks = f"{plan.blocks} blocks, " if plan.blocks > 1 else ""
    runs = f"{blocks}{len(plan.sweeps)} run{'s' * (len(plan.sweeps) > 1)} over the data at batch {plan.batch}"
    bound = "" if limit is None else f", --mem-limit {megabytes(limit)}"
    return f"the first sweep grows the process by at most {megabytes(plan.predicted_bytes)} ({runs}{bound})"


def show_result(result: Result) -> None:
    """After a compilation: the passes, the sites that were missed and why, the output."""
    rows = [_pass_row(p, inserted, result.reference) for p, inserted in zip(result.passes, result.inserted, strict=True)]
    print_table(["pass", "sites", "against", "error", "seconds", "memory"], rows, right=(4, 5))
    _show_missed(result)
    print_text("", f"output       {result.output}")
    print_text(f"size         {megabytes(result.output_bytes)} ({result.given} {megabytes(result.source_bytes)})")
    print_text(f"SQNR         {_figure(result)}{worst(result.outputs)}")
    show_outputs(result.outputs)
    if result.float_db is not None:
        print_text(f"             {number(result.float_db, unit=' dB')} against the float model inside it")
    print_text(*(_cost_line(r.numbers) for r in result.remarks if "bops" in r.numbers and not r.node))
    print_text(f"calibration  {_used(result)}")
    print_text(f"sweeps       {result.sweeps}")
    for note in result.notes:
        print_text(f"note         {note}")
    if result.engine is not None:
        show_engine(result.engine)


def _figure(result: Result) -> str:
    """The figure, against what, and of which samples; that there is none where nothing was compared."""
    if not result.measured_on:
        return "not measured" + (" (--verify off)" if result.options.verify == "off" else "")
    return f"{number(result.sqnr_db, unit=' dB')} against {result.reference}, {_measured_on(result)}"


def _measured_on(result: Result) -> str:
    """Whose figure it is."""
    if result.held_back:
        return f"on {result.measured_on} samples no pass saw"
    return f"on {result.measured_on} of the samples it was fitted to (too few to hold some back: give more)"


def _pass_row(p: PassReport, inserted: bool, reference: str) -> tuple[str, ...]:
    compared = p.relative_error is not None or p.outputs
    against = {"equivalent": "step before", "lower": reference.removeprefix("the ")}.get(p.kind, "") if compared else ""
    error = number(p.sqnr_db, unit=" dB") if p.kind == "lower" else number(p.relative_error, ".1e") if p.relative_error else "0"
    shown = error if against else ""
    return f"{'+ ' if inserted else ''}{p.spec}", tally(p), against, shown, f"{p.seconds:.1f}", f"{p.peak_rss_mb:.0f} MB"


def _cost_line(numbers: Mapping[str, float | int | str]) -> str:
    macs, bops, stored = (int(numbers[key]) for key in ("macs", "bops", "weight_bytes"))
    return cost_line(macs, bops, stored)


def _show_missed(result: Result) -> None:
    missed = Counter((r.pass_name, r.reason) for r in result.remarks if r.kind == "missed")
    if missed:
        print_text("", "missed sites (all of them: --remarks OUT.json)")
        rows = [(name, str(n), reason) for (name, reason), n in sorted(missed.items(), key=lambda x: (x[0][0], -x[1]))]
        print_table(["pass", "count", "reason"], rows, right=(1,))


def _used(result: Result) -> str:
    if not result.samples:
        return "none"
    how = ", found beside the model" if result.options.calib is None and result.options.stats is None else ""
    return f"{result.samples} samples of {result.calibration}{how}"
