"""The one orchestrator: load, plan, run, save, build."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompile._version import __version__
from qcompile.decide.decisions import lines
from qcompile.errors import GateError, InputError, ModelError, UsageError
from qcompile.execute.session import seed_random_operators
from qcompile.ir.atomic import atomic_file
from qcompile.ir.infer import drop_false_names, restore_declared
from qcompile.ir.model import Model
from qcompile.ir.quantizers import is_quantized
from qcompile.ir.reader import file_bytes
from qcompile.ir.text import print_model
from qcompile.ir.verify import verify_interface
from qcompile.pipeline.base import Kind
from qcompile.pipeline.registry import IMPORT
from qcompile.pipeline.runner import Failure, Ran, Runner, Starts, drive, without_data
from qcompile.report import (
    SCHEMA_VERSION,
    SILENT,
    Comparison,
    OutputFigure,
    PassReport,
    Progress,
    Remark,
    json_text,
    warned,
)
from qcompile.verbs.build import EngineResult, gpu_list, make_engine, profiles_from
from qcompile.verbs.compile.job import Job, done_passes, prepare
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.poor import poor_result
from qcompile.verbs.compile.statistics import Calibration, open_calibration
from qcompile.verbs.compile.trial import FileTrial
from qcompile.verbs.guards import randomness, unmatched
from qcompile.verbs.options import changed, made, to_json, words

REPRODUCED = (
    "passes", "target", "scheme", "stats", "calib", "samples", "batch", "preprocess", "keep_float", "only", "quantize", "bits",
    "seed",
)  # fmt: skip
"""What a pass that failed depends on; --range is in its spec."""


@dataclass(frozen=True)
class Result:
    """What a compilation made and what happened on the way.

    Figures are those of the file in its target's own setting (`measured`) where that is not exact arithmetic, on `measured_on`
    samples; `held_back`: of such that nothing was fitted to.
    """

    output: Path
    pipeline: str
    target: str
    scheme: str
    passes: tuple[PassReport, ...]
    sweeps: int
    samples: int
    calibration: str
    measured_on: int = 0
    held_back: bool = False
    notes: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    inserted: tuple[bool, ...] = ()
    source_bytes: int = 0
    output_bytes: int = 0
    engine: EngineResult | None = None
    model: Model | None = field(default=None, repr=False)
    measured: Comparison | None = None

    @property
    def remarks(self) -> list[Remark]:
        """All remarks in order."""
        return [r for p in self.passes for r in p.remarks]

    @property
    def compared(self) -> PassReport | None:
        """The last step that was compared with the float model."""
        return next((p for p in reversed(self.passes) if p.outputs and p.kind == Kind.LOWER.value), None)

    @property
    def sqnr_db(self) -> float | None:
        """SQNR of the worst float output against the float model, dB; None where none was or can be measured."""
        found = self.measured or self.compared
        return None if found is None else found.sqnr_db

    @property
    def reference(self) -> str:
        """What outputs were compared with: the float model, or the quantized one that was imported."""
        imported = any(p.spec.partition("{")[0] == IMPORT for p in self.passes)
        return "the imported quantized model" if imported else "the float model"

    @property
    def given(self) -> str:
        """What the model was that came in."""
        taken = ("import-qdq", "dequantize")
        quantized = any(p.modified and p.spec.partition("{")[0] in taken for p in self.passes)
        return "quantized model" if quantized else "float model"

    @property
    def float_db(self) -> float | None:
        """Of an imported model: SQNR against the float model inside it, dB."""
        return None if self.compared is None else self.compared.float_db

    @property
    def outputs(self) -> tuple[OutputFigure, ...]:
        """What is said of each output beside the float model's, worst first."""
        found = self.measured or self.compared
        return () if found is None else found.outputs

    def to_json(self) -> dict[str, Any]:
        """The report document; with `engine` if one was built."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "output": str(self.output),
            "pipeline": self.pipeline,
            "target": self.target,
            "scheme": self.scheme,
            "calibration": self.calibration,
            "samples": self.samples,
            "sweeps": self.sweeps,
            "sqnr_db": self.sqnr_db,
            "measured_on": self.measured_on,
            "held_back": self.held_back,
            "reference": self.reference,
            "float_db": self.float_db,
            "outputs": [asdict(o) for o in self.outputs],
            "notes": list(self.notes),
            "selectors": {option: list(texts) for option, texts in self.options.selection.by_option.items()},
            "options": to_json(self.options),
            "passes": [p.to_json() for p in self.passes],
        }
        return document if self.engine is None else document | {"engine": self.engine.to_json()}


def compile(path: str | Path, options: Options | None = None, *, progress: Progress | None = None, **named: Any) -> Result:
    """Compile an ONNX model: `compile("m.onnx", passes="repq,smooth", target="ort", calib="images.npz")`.

    Options may be given as an `Options` or by name (see `qcompile.verbs.compile.options`); MODEL.qcompile.toml beside the model
    says what they leave open.  Writes the output atomically and returns what happened.

    Raises:
        QcompileError: see `qcompile.errors`; nothing is written then but, if a pass failed, its reproducer.
    """
    if options is not None and named:
        raise UsageError("give options either as an Options object or by name, not both")
    given = named if options is None else changed(options)
    return run(prepare(path, made(Options, given, Path(path))), progress or SILENT)


def run(job: Job, progress: Progress) -> Result:
    """Run a prepared job: save its output, the reports, and the engine if it asks for one."""
    result, options = _compiled(job, progress), job.options
    if options.engine is None:
        return result
    gpus, shapes = gpu_list(options.gpu), profiles_from(options.profiles)
    engine = make_engine(result.output, options.engine, target=result.target, gpus=gpus, profiles=shapes, note=progress.note)
    return replace(result, engine=engine)


def _compiled(job: Job, progress: Progress) -> Result:
    notes = unmatched(job.model, job.options.selection.by_option)
    notes += [text for scheme, text in job.target.caveats if scheme == job.scheme.name]
    if random := randomness(job.model):
        seed_random_operators(job.options.seed)
        notes += random
    warned(notes, progress.note)
    calibration = open_calibration(job, progress)
    notes += warned(calibration.warnings if calibration is not None else (), progress.note)
    comparator = None if calibration is None else calibration.comparator(job)
    runner = Runner(
        comparator,
        job.options.verify,
        job.options.strict,
        on_failure=lambda f: _reproduce(f, job),
        known={} if calibration is None else calibration.known,
    )
    digest = job.model.digest()
    steps = runner.steps(job.model, job.plan.passes, job.context(), user=[not i for i in job.plan.inserted])
    answer = without_data if calibration is None else calibration.collect
    model, reports = drive(steps, answer, lambda event: _tell(event, job, progress))
    notes += warned(calibration.range_warnings if calibration is not None else (), progress.note)
    if not any(p.changes_function for p in job.plan.passes):
        notes += warned(restore_declared(model, job.model), progress.note)
    if calibration is not None:
        notes += warned(drop_false_names(model, calibration.shapes), progress.note)
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
        0 if comparator is None else comparator.samples,
        calibration is not None and calibration.held_back,
        notes=tuple(notes),
        options=job.options,
        inserted=tuple(job.plan.inserted),
        source_bytes=0 if job.model.path is None else file_bytes(job.model.path),
        model=model,
    )
    feeds = [] if calibration is None else calibration.feeds(job) if comparator is None else comparator.feeds
    passes = job.target.default(job.scheme) if job.options.passes is None else job.options.passes
    trial = FileTrial(job.target, job.model, feeds, job.options.threads, passes, comparator, runner.reference)
    done: list[Result] = []

    def accept(file: Path) -> None:
        tried = _tried(result, job, trial, file)
        compared = None if calibration is None else calibration.compared
        # what the kernels of this machine cost on top is said by the trial: a poor result is one of exact arithmetic
        poor = warned(poor_result(job, model, result.outputs, compared), progress.note)
        done.append(replace(tried, output_bytes=file_bytes(file), notes=(*tried.notes, *poor)))
        _stage_reports(done[0], job.options, staged)

    with ExitStack() as staged:
        model.save(job.output, accept)
    warned(trial.warnings, progress.note)
    return done[0]


def _tried(result: Result, job: Job, trial: FileTrial, file: Path) -> Result:
    """The result with the figures of `file` in its target's own setting, and what is to be said of it.

    Raises:
        QcompileError: the file fails there, or is worse than --min-sqnr; it is not to be kept then.
    """
    trial.take(file, None if result.compared is None else result.compared.comparison)
    if not any(p.changes_function for p in job.plan.passes):
        verify_interface(job.model, trial.written, job.plan.passes[-1].name if job.plan.passes else "")
    if not set(job.target.lowering(job.scheme)) <= set(done_passes(trial.written)):
        trial.loads()
    elif trial.large:
        trial.only_loads()
    else:
        job.target.tries(trial)
    result = replace(result, measured=trial.measured, notes=(*result.notes, *trial.warnings))
    _gate(result, job.options.min_sqnr)
    return result


def _gate(result: Result, minimum: float | None) -> None:
    if minimum is None:
        return
    if result.sqnr_db is None:
        why = "; ".join(f"{o.name}: {o.note or 'no floats'}" for o in result.outputs) or "nothing was compared"
        raise GateError(f"--min-sqnr has nothing to hold: no output can be measured in dB ({why}); leave it out")
    if not result.sqnr_db >= minimum:
        raise GateError(
            f"the SQNR of output {result.outputs[0].name!r} is {result.sqnr_db:.1f} dB, below --min-sqnr {minimum:g};"
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
    earlier = "" if is_quantized(job.model.graph) else job.model.metadata.get("qcompile.pipeline", "")
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
    quantizes = [r for r in reports if r.kind == Kind.ANNOTATE.value]
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
    data = job.data_source if job.options.calib or not job.options.stats else None
    alone = replace(job.options, passes=failure.spec, target=job.target.name, scheme=job.scheme.name, calib=data)
    return f"\n  reproduce: {shlex.join(['qcompile', str(before), '--exact', *words(alone, REPRODUCED)])}"


def _stage_reports(result: Result, options: Options, reports: ExitStack) -> None:
    """Write the JSON report and the remarks, if asked for; they take their names when `reports` closes, behind the model.

    Raises:
        ModelError: one cannot be written.
    """
    remarks = {"schema_version": SCHEMA_VERSION, "remarks": [r.to_json() for r in result.remarks]}
    for path, flag, document in (
        (options.report, "--report", result.to_json()),
        (options.remarks, "--remarks", remarks),
    ):
        if path is None:
            continue
        try:
            file = reports.enter_context(atomic_file(path))
            file.write(f"{json_text(document)}\n".encode())
            file.flush()
        except OSError as e:
            raise ModelError(
                f"cannot write {path}: {e.strerror or e}; nothing was written; choose another place with {flag}"
            ) from e
