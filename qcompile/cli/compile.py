"""`qcompile MODEL`: the default command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qcompile.cli.build import show_engine
from qcompile.cli.check import cost_line
from qcompile.cli.options import Size, batch_option, range_option
from qcompile.cli.output import megabytes, number, print_json, print_table, print_text
from qcompile.cli.progress import Reporter, reporter, tally
from qcompile.errors import UsageError
from qcompile.report import SCHEMA_VERSION, PassReport
from qcompile.verbs.build import DEFAULT_GPU, EngineResult, gpu_list, make_engine, profiles_from, require_engine
from qcompile.verbs.compile.rehearse import Rehearsal, rehearse
from qcompile.verbs.compile.run import (
    DEFAULT_SAMPLES,
    SCHEMES,
    TARGETS,
    Job,
    MemoryPlan,
    Options,
    Result,
    describe_plan,
    prepare,
    run,
    write_report,
)
from qcompile.verbs.guards import require_place
from qcompile.verbs.inspect import model_bytes

DELIVERED = [s for s in SCHEMES if any(s in t.schemes for t in TARGETS.values())]
_DATA_HELP = "npz, folder, pictures, file.py:function, polygraphy JSON or 'random'; default: MODEL.calib.npz beside MODEL."
SELECTORS = "a name (glob), re:REGEX, op:TYPE or region:FROM..TO"
_TARGET_HELP = "; ".join(f"{t.name}: {t.title}" for t in TARGETS.values())


@click.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--passes", help="Pipeline, e.g. 'repq,smooth{alpha=0.6}'; default: the target's (see: qcompile passes).")
@click.option("--target", type=click.Choice(list(TARGETS)), help=f"Default trt. {_TARGET_HELP}.")
@click.option("--scheme", type=click.Choice(DELIVERED), help="Default w8a8. Which target takes which: docs/guide/targets.md.")
@click.option("--calib", metavar="DATA", help=_DATA_HELP)
@click.option("--stats", type=click.Path(path_type=Path), metavar="FILE", help="What qcompile calibrate gathered: no sweep.")
@click.option("--samples", type=click.IntRange(1), help=f"Spread evenly over DATA; default: at most {DEFAULT_SAMPLES}.")
@batch_option
@click.option("--preprocess", metavar="SPEC", help="For pictures: a preset or a TOML file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="OUT.onnx", help="Default here: MODEL.TARGET-SCHEME.onnx."
)
@click.option(
    "--engine", type=click.Path(path_type=Path), metavar="OUT", help="Also build an engine (rtx and trt), and audit it (rtx)."
)
@click.option(
    "--gpu", default=DEFAULT_GPU, show_default=True, metavar="SM,..", help="For rtx; trt builds for this machine's GPU."
)
@click.option("--profile", metavar="SHAPES", help="Of the engine, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max).")
@click.option("--verify", type=click.Choice(["each", "end", "off"]), default="each", show_default=True, help="Compare outputs.")
@range_option
@click.option("--keep-float", multiple=True, metavar="SELECTOR", help=f"Leave these nodes in float: {SELECTORS}. Repeatable.")
@click.option("--only", multiple=True, metavar="SELECTOR", help="Quantize only these nodes; repeatable.")
@click.option(
    "--quantize", multiple=True, metavar="SELECTOR", help="Quantize these too, although the default leaves them in float."
)
@click.option(
    "--bits", multiple=True, metavar="SELECTOR=wXaY", help="Integer target: other widths for these layers, e.g. 'fc*=w4a4'."
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail (exit 1) if the output's SQNR is lower.")
@click.option("--report", type=click.Path(path_type=Path), metavar="OUT.json", help="Write everything that happened.")
@click.option("--remarks", type=click.Path(path_type=Path), metavar="OUT.json", help="Write what happened at every site.")
@click.option("--dry-run", is_flag=True, help="Print the completed pipeline and the sweeps it needs; write nothing.")
@click.option("--exact", is_flag=True, help="Run exactly these passes, insert none.")
@click.option("--strict", is_flag=True, help="Fail (exit 1) if one of your passes changes nothing.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
@click.option("--mem-limit", type=Size(), metavar="SIZE", help="Of calibration, e.g. 4GiB; more sweeps where one is too large.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads; default: all cores.")
@click.option("--print-after", is_flag=True, help="Print the graph after every pass, on standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, nothing else, on standard output.")
def command(  # one argument an option: click's way
    model: Path,
    engine: Path | None,
    gpu: str,
    profile: str | None,
    report: Path | None,
    remarks: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL (the default command).

    Runs the passes, verifies each, writes a Q/DQ model, and an engine if asked.
    """
    job = prepare(model, Options(**options))
    gpus = gpu_list(gpu)
    if profile is not None and engine is None:
        raise UsageError("--profile is of an engine; add --engine OUT")
    taken = [model, job.output]
    for out, what in ((engine, "the engine"), (report, "the report"), (remarks, "the remarks file")):
        require_place(out, what, taken)
        taken += [] if out is None else [out]
    if engine is not None:
        _check_engine(job, engine, gpus)
    if dry_run:
        print_json(_plan_document(job)) if as_json else show_plan(job)
        return
    with reporter() as progress:
        result, made = _run(job, progress, engine, gpus, profile, report, remarks)
    if as_json:
        print_json(result.to_json() | ({} if made is None else {"engine": made.to_json()}))
        return
    show_result(job, result, model_bytes(job.model, model))
    if made is not None:
        show_engine(made)


def _check_engine(job: Job, engine: Path, gpus: tuple[str, ...]) -> None:
    if job.scheme.simulated:
        raise UsageError(f"no engine computes in {job.scheme.name}, it is only simulated; drop --engine, or choose --scheme w8a8")
    codes = [t.name for t in (job.scheme.weight, job.scheme.activation) if t is not None]
    require_engine(job.target.name, engine, gpus, codes)


def _run(
    job: Job,
    progress: Reporter,
    engine: Path | None,
    gpus: tuple[str, ...],
    profile: str | None,
    report: Path | None,
    remarks: Path | None,
) -> tuple[Result, EngineResult | None]:
    shapes = profiles_from([] if profile is None else [profile])
    result = run(job, progress)
    write_report(result, report, remarks)
    if engine is None:
        return result, None
    return result, make_engine(result.output, engine, target=result.target, gpus=gpus, profiles=shapes, note=progress.note)


def _plan_document(job: Job) -> dict[str, Any]:
    rehearsal = rehearse(job)
    passes = [{"pass": spec, "help": text, "inserted": inserted} for spec, text, inserted in describe_plan(job)]
    return {
        "schema_version": SCHEMA_VERSION, "pipeline": job.pipeline, "target": job.target.name, "scheme": job.scheme.name,
        "output": str(job.output), "calibration": calibration_line(job), "sweeps": len(rehearsal.sweeps),
        "memory": memory_document(job, rehearsal.memory), "passes": passes,
    }  # fmt: skip


def show_plan(job: Job) -> None:
    """`--dry-run`: the pipeline, its passes, the data and the sweeps."""
    rehearsal = rehearse(job)
    print_text(job.pipeline, "")
    plan = describe_plan(job)
    chosen = "default" if job.options.passes is None else "you"
    print_table(["pass", "from", "what"], [(spec, "inserted" if inserted else chosen, text) for spec, text, inserted in plan])
    print_text("", f"output       {job.output}", f"calibration  {calibration_line(job)}")
    print_text(f"sweeps       {sweeps_line(rehearsal)}")
    if rehearsal.memory is not None:
        print_text(f"memory       {_memory_line(rehearsal.memory, job.options.mem_limit)}")


def sweeps_line(rehearsal: Rehearsal) -> str:
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


def memory_document(job: Job, plan: MemoryPlan | None) -> dict[str, Any] | None:
    """The same as JSON; None where nothing is swept."""
    if plan is None:
        return None
    sweeps = [{"probes": len(s.probes), "predicted_bytes": s.predicted_bytes} for s in plan.sweeps]
    return {"batch": plan.batch, "blocks": plan.blocks, "limit_bytes": job.options.mem_limit, "runs": sweeps}


def calibration_line(job: Job) -> str:
    """Which data, how many samples, and whether convention chose it."""
    if job.options.stats is not None:
        return f"statistics from {job.options.stats}"
    if job.data_source is None:
        return "none found"
    how = " (found beside the model; --calib chooses other data)" if job.options.calib is None else ""
    count = job.options.samples or f"at most {DEFAULT_SAMPLES}"
    return f"{count} samples of {job.data_source}{how}"


def show_result(job: Job, result: Result, source_bytes: int) -> None:
    """After a compilation: the passes, the sites that were missed and why, the output."""
    rows = [_pass_row(p, inserted) for p, inserted in zip(result.passes, job.plan.inserted, strict=True)]
    print_table(["pass", "sites", "against", "error", "seconds", "memory"], rows, right=(4, 5))
    _show_missed(result)
    size = Path(result.output).stat().st_size
    print_text("", f"output       {result.output}")
    print_text(f"size         {megabytes(size)} (float model {megabytes(source_bytes)})")
    print_text(f"SQNR         {number(result.sqnr_db, unit=' dB')} against the float model, on calibration samples")
    print_text(*(cost_line(r.numbers) for r in result.remarks if "bops" in r.numbers and not r.node))
    print_text(f"calibration  {_used(job, result)}")
    print_text(f"sweeps       {result.sweeps}")
    for note in result.notes:
        print_text(f"note         {note}")


def _pass_row(p: PassReport, inserted: bool) -> tuple[str, ...]:
    against = {"equivalent": "step before", "lower": "float model"}.get(p.kind, "") if p.relative_error is not None else ""
    error = number(p.sqnr_db, unit=" dB") if p.kind == "lower" else number(p.relative_error, ".1e") if p.relative_error else "0"
    shown = "" if p.relative_error is None else error
    return f"{'+ ' if inserted else ''}{p.spec}", tally(p), against, shown, f"{p.seconds:.1f}", f"{p.peak_rss_mb:.0f} MB"


def _show_missed(result: Result) -> None:
    missed = Counter((r.pass_name, r.reason) for r in result.remarks if r.kind == "missed")
    if missed:
        print_text("", "missed sites (all of them: --remarks OUT.json)")
        rows = [(name, str(n), reason) for (name, reason), n in sorted(missed.items(), key=lambda x: (x[0][0], -x[1]))]
        print_table(["pass", "count", "reason"], rows, right=(1,))


def _used(job: Job, result: Result) -> str:
    if not result.samples:
        return "none"
    how = ", found beside the model" if job.options.calib is None and job.options.stats is None else ""
    return f"{result.samples} samples of {result.calibration}{how}"
