"""Results as tables and lines for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qcompile.cli.check_view import cost_line
from qcompile.cli.output import flops, megabytes, number, percent, print_table, print_text
from qcompile.cli.progress import tally
from qcompile.pipeline.describe import statistics_readers
from qcompile.report import PassReport
from qcompile.verbs.build import EngineResult
from qcompile.verbs.compile.run import DEFAULT_SAMPLES, Job, MemoryPlan, Result, describe_plan, planned_memory

WORST_LAYERS = 12
FLOAT_NODES = 8


def show_plan(job: Job) -> None:
    """`--dry-run`: the pipeline, its passes, the data and the sweeps."""
    memory = planned_memory(job)
    print_text(job.pipeline, "")
    plan = describe_plan(job)
    chosen = "default" if job.options.passes is None else "you"
    print_table(["pass", "from", "what"], [(spec, "inserted" if inserted else chosen, text) for spec, text, inserted in plan])
    print_text("", f"output       {job.output}", f"calibration  {calibration_line(job)}", f"sweeps       {sweeps_line(job)}")
    if memory is not None:
        print_text(f"memory       {_memory_line(memory, job.options.mem_limit)}")


def sweeps_line(job: Job) -> str:
    """Which passes read statistics: each needs a sweep at most, and shares one where nothing in between moves its tensors."""
    readers = statistics_readers(job.plan.passes)
    if not readers:
        return "none"
    shared = "passes share one where nothing between them moves their tensors"
    return f"at most {len(readers)} ({', '.join(readers)}); {shared}"


def _memory_line(plan: MemoryPlan, limit: int | None) -> str:
    """The predicted peak of the first sweep, and what it is tiled into."""
    blocks = f"{plan.blocks} blocks, " if plan.blocks > 1 else ""
    runs = f"{blocks}{len(plan.sweeps)} run{'s' * (len(plan.sweeps) > 1)} over the data at batch {plan.batch}"
    bound = "" if limit is None else f", --mem-limit {megabytes(limit)}"
    return f"the first sweep grows the process by at most {megabytes(plan.predicted_bytes)} ({runs}{bound})"


def memory_document(job: Job) -> dict[str, Any] | None:
    """The same as JSON; None where nothing is swept."""
    plan = planned_memory(job)
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


def show_engine(made: EngineResult) -> None:
    """The engine's file, its profile and the audits."""
    b = made.build
    how = f"built in {b.seconds:.1f} s with {b.manifest['backend']} {b.version}"
    print_text("", f"engine       {b.path} ({megabytes(b.size)}, {how})")
    print_text(f"manifest     {b.manifest_path}")
    for profile in b.profiles:
        print_text(f"profile      {_profile(profile.to_json())} ({profile.source})")
    for audit in made.audits:
        print_text(*audit_lines(audit.summary()))


def _profile(shapes: dict[str, list[list[int]]]) -> str:
    return "; ".join(f"{name}:{','.join('x'.join(map(str, s)) for s in three)}" for name, three in shapes.items())


def audit_lines(a: dict[str, Any]) -> list[str]:
    """The figures of one audit."""
    blocks = f"{a['attention_fused_blocks']} of {a['attention_blocks']} blocks" if a["attention_blocks"] else "no attention"
    return [
        f"audit        {a['gpu']} ({a['label']} {a['version']}; built, not run)",
        _share(a),
        f"coverage     {percent(a['coverage'])} of all GEMM, convolution and attention work ({flops(a['total_flops'])}FLOP)",
        f"attention    {blocks} run as one fused kernel" if a["attention_blocks"] else f"attention    {blocks}",
    ]


def _share(a: dict[str, Any]) -> str:
    if a["share"] is not None:
        return f"share        {percent(a['share'])} of the planned work runs in low-precision kernels"
    only = f"; {percent(a['weight_only_flops'] / a['total_flops'])} reads low-precision weights" if a["weight_only_flops"] else ""
    return f"share        - (no work has low-precision inputs on both sides{only})"


def show_audit(document: dict[str, Any]) -> None:
    """The figures, the nodes that run in float, and the Q/DQ pairs that gain nothing."""
    print_text(*audit_lines(document))
    if document["profile"]:
        print_text(f"profile      {_profile(document['profile']['shapes'])} ({document['profile']['source']})")
    floats = sorted(document["float_nodes"], key=lambda n: -n["flops"])
    if floats:
        print_text("", f"in float: {len(floats)} nodes (largest first)")
        rows = [(n["node"], n["op_type"], flops(n["flops"]), n["planned"] or "-") for n in floats[:FLOAT_NODES]]
        print_table(["node", "operator", "FLOPs", "planned"], rows, right=(2,))
    if document["wasted_pairs"]:
        print_text("", "Q/DQ pairs whose consumer runs in float")
        print_table(["pair", "node", "rule"], [(w["pair"], w["node"], w["rule"] or "-") for w in document["wasted_pairs"]])


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
