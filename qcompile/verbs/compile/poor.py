"""What is said of a poor result: that it is one, the sites that cost most, and what to type next."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import replace

from qcompile.calib.data.dataset import Dataset
from qcompile.errors import QcompileError
from qcompile.ir.model import Model
from qcompile.ir.ops import int_attr, is_op
from qcompile.ir.optable import ops_with
from qcompile.ir.select import exactly
from qcompile.report import OutputFigure
from qcompile.verbs.compile.job import Job
from qcompile.verbs.evaluate.layers import LayerError, layer_errors
from qcompile.verbs.options import words

BARS = {
    "fp16": 40.0,  # ten bits of mantissa: less is an overflow or a lost small number
    "bf16": 25.0,  # seven bits
    "w8a8": 20.0,  # a tenth of the output's size: classes begin to change (72 public models: those that worked had 23 and more)
    "fp8": 15.0,  # three bits of mantissa
    "mxfp8": 15.0,
    "w6a6": 12.0,
    "w4a16": 10.0,  # four bits of weights: a third of the output's size
    "w4a8": 10.0,
    "nvfp4": 8.0,
    "w4a4": 4.0,  # published four-bit results without training stand at 4 to 15 dB
}
"""SQNR in dB below which a scheme's result is poor, and why."""
_SITES, _SHARE, _SAMPLES = 3, 0.05, 4
_NEXT = (
    "passes",
    "target",
    "scheme",
    "stats",
    "calib",
    "samples",
    "preprocess",
    "only",
    "quantize",
    "bits",
    "output",
    "keep_float",
)


def poor_result(job: Job, model: Model, outputs: Sequence[OutputFigure], data: Dataset | None) -> list[str]:
    """A warning where the worst output, or the worst part of one, is below the scheme's bar; else nothing.

    `data` are the samples on which the tensors of both models are compared, to find where the error enters.
    """
    measured = [o for o in outputs if o.worst_db is not None]
    worst = min(measured, key=lambda o: o.worst_db or 0.0, default=None)
    bar = BARS.get(job.scheme.name)
    if worst is None or bar is None or (worst.worst_db or 0.0) >= bar:
        return []
    where = f"output {worst.name!r}" + (f" (its part {worst.parts[0].name})" if worst.parts else "")
    told = f"poor result: {where} stands at {worst.worst_db:.1f} dB, below the {bar:g} dB that {job.scheme.name} should reach"
    sites = [] if data is None else costly(job.model, model, data, job.options.threads)
    return [f"{told}{_way_on(job, sites)}"]


def costly(source: Model, model: Model, data: Dataset, threads: int | None) -> list[LayerError]:
    """The layers in which most error enters, at most three: what they add to that of their inputs."""
    with contextlib.suppress(QcompileError):  # the figure stands without them
        rows = layer_errors(source, model, data.take(_SAMPLES), threads=threads)
        layers = sorted((r for r in rows if r.node and r.op_type in ops_with("compute")), key=_added, reverse=True)
        return [r for r in layers if _added(r) > _SHARE * _added(layers[0]) > 0][:_SITES]
    return []


def _added(row: LayerError) -> float:
    """The noise that enters, as a share of the tensor's power."""
    before = 0.0 if row.input_sqnr_db is None else 10 ** (-row.input_sqnr_db / 10)
    return 10 ** (-row.sqnr_db / 10) - before


def _way_on(job: Job, sites: Sequence[LayerError]) -> str:
    model = str(job.model.path or "MODEL")
    if not sites:
        return f"; see where with qcompile eval {shlex.quote(model)} {shlex.quote(str(job.output))} --data DATA --per-layer"
    named = ", ".join(f"{s.node} ({s.sqnr_db:.1f} dB)" for s in sites)
    kept = (*job.options.keep_float, *(exactly(s.node) for s in sites))
    passes = _with_equalize(job)
    changed = {"keep_float": kept} if passes is None else {"passes": passes}
    better = replace(job.options, target=job.target.name, scheme=job.scheme.name, **changed)
    return f"; most error enters at {named}; try: {shlex.join(['qcompile', model, *words(better, _NEXT)])}"


def _with_equalize(job: Job) -> str | None:
    """The pipeline with `equalize` in front, where that may help: one scale must fit all channels of a depthwise convolution."""
    passes = job.target.default(job.scheme) if job.options.passes is None else job.options.passes
    grouped = any(is_op(n, "Conv") and int_attr(n, "group", 1) > 1 for n in job.model.graph)
    if not grouped or "equalize" in passes or job.scheme.activation is None or job.target.default(job.scheme) == "":
        return None
    return ",".join(filter(None, ("equalize", passes)))
