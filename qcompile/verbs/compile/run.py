"""The one orchestrator: load, plan, run, save, build."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile._version import __version__
from qcompile.calib.sweep.memory import MemoryPlan
from qcompile.decide.decisions import lines
from qcompile.errors import GateError, InputError, ModelError, UsageError
from qcompile.ir.atomic import write_atomic
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.pipeline.runner import Failure, Ran, Runner, Starts, drive, without_data
from qcompile.quant.spec import SCHEMES
from qcompile.report import SCHEMA_VERSION, PassReport, Remark, json_text
from qcompile.target.catalog import TARGETS
from qcompile.verbs.compile.job import (
    DEFAULT_SAMPLES,
    Job,
    Options,
    Progress,
    Silent,
    describe_plan,
    first_line,
    prepare,
)
from qcompile.verbs.compile.statistics import Calibration, open_calibration
from qcompile.verbs.guards import unmatched

__all__ = [
    "DEFAULT_SAMPLES", "SCHEMES", "TARGETS", "Job", "MemoryPlan", "Options", "Progress", "Result", "Silent", "compile",
    "describe_plan", "first_line", "prepare", "run", "write_report",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a compilation made and what happened on the way."""

    output: Path
    pipeline: str
    target: str
    scheme: str
    passes: tuple[PassReport, ...]
    sweeps: int
    samples: int
    calibration: str
    notes: tuple[str, ...] = ()
    selectors: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    model: Model | None = field(default=None, repr=False)

    @property
    def remarks(self) -> list[Remark]:
        """All remarks in order."""
        return [r for p in self.passes for r in p.remarks]

    @property
    def sqnr_db(self) -> float | None:
        """Output SQNR of the last compared step against the float model, dB."""
        return next((p.sqnr_db for p in reversed(self.passes) if p.sqnr_db is not None and p.kind == "lower"), None)

    def to_json(self) -> dict[str, Any]:
        """The report document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "output": str(self.output),
            "pipeline": self.pipeline,
            "target": self.target,
            "scheme": self.scheme,
            "calibration": self.calibration,
            "samples": self.samples,
            "sweeps": self.sweeps,
            "sqnr_db": self.sqnr_db,
            "notes": list(self.notes),
            "selectors": {option: list(texts) for option, texts in self.selectors.items()},
            "passes": [p.to_json() for p in self.passes],
        }


def compile(path: str | Path, options: Options | None = None, *, progress: Progress | None = None, **named: Any) -> Result:
    """Compile an ONNX model: `compile("m.onnx", passes="repq,smooth", target="ort", calib="images.npz")`.

    Options may be given as an `Options` or by name.  Writes the output atomically and returns what happened.

    Raises:
        QcompileError: see `qcompile.errors`; nothing is written then but, if a pass failed, its reproducer.
    """
    if options is not None and named:
        raise UsageError("give options either as an Options object or by name, not both")
    return run(prepare(path, options or Options(**named)), progress or Silent())


def run(job: Job, progress: Progress) -> Result:
    """Run a prepared job and save its output."""
    notes = unmatched(job.model, job.options.selection.by_option)
    notes += [text for scheme, text in job.target.caveats if scheme == job.scheme.name]
    _warned(notes, progress)
    calibration = open_calibration(job, progress)
    notes += _warned(calibration.warnings if calibration is not None else (), progress)
    runner = Runner(
        None if calibration is None else calibration.comparator(job),
        job.options.verify,
        job.options.strict,
        on_failure=lambda f: _reproduce(f, job),
        known={} if calibration is None else calibration.known,
    )
    digest = job.model.digest()
    steps = runner.steps(job.model, job.plan.passes, job.context(), user=[not i for i in job.plan.inserted])
    answer = without_data if calibration is None else calibration.collect
    model, reports = drive(steps, answer, lambda event: _tell(event, job, progress))
    notes += _warned(calibration.range_warnings if calibration is not None else (), progress)
    _describe(model, job, calibration, digest)
    _check_matched(job, reports, model)
    result = Result(
        job.output,
        job.pipeline,
        job.target.name,
        job.scheme.name,
        tuple(reports),
        calibration.sweeps if calibration is not None else 0,
        calibration.samples if calibration is not None else 0,
        calibration.source if calibration is not None else "none",
        notes=tuple(notes),
        selectors=job.options.selection.by_option,
        model=model,
    )
    _gate(result, job.options.min_sqnr)
    model.save(job.output)
    return result


def _warned(warnings: Sequence[str], progress: Progress) -> list[str]:
    for text in warnings:
        progress.note(f"warning: {text}")
    return list(warnings)


def _gate(result: Result, minimum: float | None) -> None:
    if minimum is not None and (result.sqnr_db is None or result.sqnr_db < minimum):
        raise GateError(
            f"the output's SQNR is {result.sqnr_db} dB, below --min-sqnr {minimum};"
            " keep sensitive layers in float with --keep-float"
        )


def _tell(event: Starts | Ran, job: Job, progress: Progress) -> None:
    if isinstance(event, Starts):
        progress.on_pass(event.spec, event.index, event.total)
        return
    progress.on_done(event.report)
    if job.options.print_after:
        progress.note(f"after {event.report.spec}:\n{print_model(event.model, lines)}")


def _describe(model: Model, job: Job, calibration: Calibration | None, digest: str) -> None:
    earlier = job.model.metadata.get("qcompile.pipeline", "")
    model.metadata.update(
        {
            "qcompile.version": __version__,
            "qcompile.pipeline": ",".join(filter(None, (earlier, job.pipeline))),
            "qcompile.target": job.target.name,
            "qcompile.scheme": job.scheme.name,
            "qcompile.seed": str(job.options.seed),
            "qcompile.source": digest,
        }
    )
    if calibration is not None:
        note = {"samples": calibration.samples, "fingerprint": calibration.fingerprint, "random": calibration.random}
        model.metadata["qcompile.calibration"] = json.dumps(note)
        model.metadata["qcompile.shapes"] = json.dumps(calibration.shapes, sort_keys=True)
    model.ir.producer_name, model.ir.producer_version = "qcompile", __version__


def _check_matched(job: Job, reports: Sequence[PassReport], model: Model) -> None:
    """A scheme that found nothing to quantize is not a success."""
    quantizes = [r for r in reports if r.spec.startswith("annotate")]
    if quantizes and not any(r.modified for r in quantizes) and job.scheme.weight is not None:
        reasons = (
            "; ".join(dict.fromkeys(x.reason for r in quantizes for x in r.remarks))
            or "the graph has no matrix product or convolution"
        )
        raise ModelError(
            f"nothing in the model can be quantized to {job.scheme.name} for {job.target.name}: {reasons};"
            " see --remarks, or choose another scheme"
        )


def _reproduce(failure: Failure, job: Job) -> str:
    """Save the model as it was before the failing pass, and say how to run that pass alone."""
    if isinstance(failure.error, (InputError, UsageError)):
        return ""
    name = re.sub(r"[^\w.-]+", "-", failure.spec.partition("{")[0])
    before = job.output.with_name(f"{job.output.stem}.before-{name}.onnx")
    try:
        failure.model.save(before)
    except ModelError:
        return ""
    words = [
        "qcompile",
        str(before),
        "--exact",
        "--passes",
        failure.spec,
        "--target",
        job.target.name,
        "--scheme",
        job.scheme.name,
    ]
    words += ["--stats", str(job.options.stats)] if job.options.stats else []
    words += ["--calib", job.data_source] if job.data_source and (job.options.calib or not job.options.stats) else []
    words += ["--samples", str(job.options.samples)] if job.options.samples else []
    words += ["--batch", str(job.options.batch)] if job.options.batch else []
    words += ["--preprocess", job.options.preprocess] if job.options.preprocess else []
    for option, texts in job.options.selection.by_option.items():
        words += [w for text in texts for w in (f"--{option.replace('_', '-')}", text)]
    words += ["--seed", str(job.options.seed)] if job.options.seed else []
    return f"\n  reproduce: {shlex.join(words)}"


def write_report(result: Result, report: str | Path | None, remarks: str | Path | None) -> None:
    """Write the JSON report and the remarks, if asked for."""
    if report is not None:
        write_atomic(Path(report), json_text(result.to_json()) + "\n")
    if remarks is not None:
        document = {"schema_version": SCHEMA_VERSION, "remarks": [r.to_json() for r in result.remarks]}
        write_atomic(Path(remarks), json_text(document) + "\n")
