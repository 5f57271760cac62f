"""The one orchestrator: load, plan, run, save, build."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qcompile import __version__
from qcompile.calib.data import Dataset, find_beside, load_data
from qcompile.errors import DataError, GateError, InputError, ModelError, UsageError
from qcompile.guards import require_numbers, require_sane, unmatched
from qcompile.ir.atomic import write_atomic
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from qcompile.pipeline.base import Fact, Pass, PassContext
from qcompile.pipeline.planner import Plan, complete
from qcompile.pipeline.runner import Failure, Runner, VerifyMode
from qcompile.pipeline.spec import format_pipeline, near
from qcompile.providers import SweepStatistics, comparator
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.report import SCHEMA_VERSION, PassReport, Remark, json_text
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Target

DEFAULT_SAMPLES = 128


class Progress(Protocol):
    """Who is told how far the work is."""

    def on_pass(self, spec: str, index: int, total: int) -> None: ...
    def on_done(self, report: PassReport) -> None: ...
    def on_sweep(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


class Silent:
    """Tells nobody."""

    def on_pass(self, spec: str, index: int, total: int) -> None: ...
    def on_done(self, report: PassReport) -> None: ...
    def on_sweep(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass(frozen=True)
class Options:
    """What a compilation is asked to do; the fields are the command line's options."""

    passes: str | None = None
    target: str | None = None
    scheme: str | None = None
    calib: str | None = None
    samples: int | None = None
    preprocess: str | None = None
    output: str | Path | None = None
    verify: VerifyMode = "each"
    keep_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    exact: bool = False
    strict: bool = False
    seed: int = 0
    threads: int | None = None
    min_sqnr: float | None = None
    print_after: bool = False


@dataclass(frozen=True)
class Job:
    """A compilation that is ready to run: everything resolved, nothing done."""

    model: Model
    options: Options
    target: Target
    scheme: Scheme
    plan: Plan
    output: Path
    data_source: str | None

    @property
    def pipeline(self) -> str:
        """The completed pipeline as its canonical string."""
        return format_pipeline(self.plan.passes)


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
            "passes": [p.to_json() for p in self.passes],
        }


def prepare(path: str | Path, options: Options) -> Job:
    """Load the model, resolve conventions beside it, and complete the pipeline.

    Raises:
        ModelError, UsageError: the model or an option cannot be used.
    """
    model = Model.load(path)
    options = _with_sidecar(Path(path), options)
    require_sane(options.samples, options.seed, (*options.keep_float, *options.only))
    if options.min_sqnr is not None and options.verify == "off":
        raise UsageError("--min-sqnr needs a comparison with the float model; drop --verify off")
    target, scheme = _target(options.target or "trt"), _scheme(options.scheme or "w8a8")
    target.require(scheme)
    text = options.passes if options.passes is not None else registry.default_preset(target.name, scheme.name)
    plan = complete(registry.parse(text), target, scheme, exact=options.exact, held=_facts(model))
    if not plan.passes and not options.exact:
        raise ModelError(
            f"{path} already went through the whole pipeline for {target.name} and {scheme.name}; start from the float model"
        )
    output = Path(options.output) if options.output else Path(f"{Path(path).stem}.{target.name}-{scheme.name}.onnx")
    if output.exists() and output.resolve() == Path(path).resolve():
        raise UsageError(f"the output {output} is the input; choose another name with -o")
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder; name a file with -o")
    if not output.parent.is_dir():
        raise UsageError(f"the folder of the output {output} does not exist; create it first, or choose another with -o")
    require_numbers(model, path)
    return Job(model, options, target, scheme, plan, output, options.calib or find_beside(path))


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
    notes = unmatched(job.model, (*job.options.keep_float, *job.options.only))
    for note in notes:
        progress.note(f"warning: {note}")
    data = _data(job, progress)
    statistics = SweepStatistics(data, job.options.threads, progress=progress.on_sweep) if data is not None else None
    compare = (
        comparator(data, job.model.inputs(), job.options.seed, job.options.threads)
        if data is not None and job.options.verify != "off"
        else None
    )
    runner = Runner(
        statistics,
        compare,
        job.options.verify,
        job.options.strict,
        on_pass=progress.on_pass,
        on_done=lambda report, model: _done(report, model, job, progress),
        on_failure=lambda f: _reproduce(f, job),
    )
    ctx = PassContext(job.scheme, job.target, seed=job.options.seed, keep_float=job.options.keep_float, only=job.options.only)
    digest = job.model.digest()
    model, reports = runner.run(job.model, job.plan.passes, ctx, strict_for=[not i for i in job.plan.inserted])
    _describe(model, job, data, digest)
    _check_matched(job, reports, model)
    result = Result(
        job.output,
        job.pipeline,
        job.target.name,
        job.scheme.name,
        tuple(reports),
        statistics.sweeps if statistics else 0,
        len(data) if data is not None else 0,
        data.source if data is not None else "none",
        notes=tuple(notes),
        model=model,
    )
    _gate(result, job.options.min_sqnr)
    model.save(job.output)
    return result


def _gate(result: Result, minimum: float | None) -> None:
    if minimum is not None and (result.sqnr_db is None or result.sqnr_db < minimum):
        raise GateError(
            f"the output's SQNR is {result.sqnr_db} dB, below --min-sqnr {minimum};"
            " keep sensitive layers in float with --keep-float"
        )


def _done(report: PassReport, model: Model, job: Job, progress: Progress) -> None:
    progress.on_done(report)
    if job.options.print_after:
        progress.note(f"after {report.spec}:\n{print_model(model)}")


def _with_sidecar(path: Path, options: Options) -> Options:
    """Fill what the command line left open from model.qcompile.toml beside the model."""
    sidecar = path.with_name(f"{path.stem}.qcompile.toml")
    if not sidecar.is_file():
        return options
    try:
        given = tomllib.loads(sidecar.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{sidecar} is not valid TOML ({e}); correct it") from e
    known = {"passes", "target", "scheme", "preprocess", "calib", "samples"}
    for key in given:
        if key not in known:
            raise UsageError(f"{sidecar} has an unknown key {key!r}{near(key, known)} (it may hold: {', '.join(sorted(known))})")
    values = {k: getattr(options, k) for k in options.__dataclass_fields__}
    for key, value in given.items():
        _require_type(sidecar, key, value)
        if values[key] in (None, DEFAULT_SAMPLES):
            values[key] = str(sidecar.parent / value) if key == "calib" else value
    return Options(**values)


def _require_type(sidecar: Path, key: str, value: object) -> None:
    kind, words = (int, "a whole number") if key == "samples" else (str, "a string")
    if type(value) is not kind:
        raise UsageError(f"{sidecar}: {key} cannot be {value!r}; it takes {words}")


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}{near(name, TARGETS)} (targets: {', '.join(TARGETS)})")
    return TARGETS[name]


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}{near(name, SCHEMES)} (schemes: {', '.join(SCHEMES)})")
    return SCHEMES[name]


def _facts(model: Model) -> frozenset[Fact]:
    """Facts that a half-run pipeline left in the file."""
    text = model.metadata.get("qcompile.facts", "[]")
    try:
        held = json.loads(text)
    except json.JSONDecodeError as e:
        raise ModelError(
            f"the model's metadata entry qcompile.facts is not JSON ({text[:40]!r}); remove it or start from the float model"
        ) from e
    return frozenset(fact for fact in Fact if isinstance(held, list) and fact.value in held)


def _data(job: Job, progress: Progress) -> Dataset | None:
    if job.data_source is None:
        if job.options.exact or not _wants_data(job):
            return None
        raise DataError(
            "no calibration data: give some with --calib, or put"
            f" {job.model.path.stem if job.model.path else 'model'}.calib.npz beside the model"
            " (arrays named as the model's inputs, first axis = samples); --calib random is for trying things out"
        )
    asked = job.options.samples
    data = load_data(job.data_source, job.model.inputs(), job.options.preprocess, asked, job.options.seed)
    data = data if asked is not None else data.take(DEFAULT_SAMPLES)
    progress.note(f"calibrating on {len(data)} samples of {data.source}")
    return data


def _wants_data(job: Job) -> bool:
    return (
        job.scheme.activation is not None or job.scheme.body == "float16" or any(p.kind.value == "fit" for p in job.plan.passes)
    )


def _describe(model: Model, job: Job, data: Dataset | None, digest: str) -> None:
    facts = set(_facts(job.model))
    for p in job.plan.passes:
        facts = (facts - p.invalidates) | p.establishes
    model.metadata.update(
        {
            "qcompile.version": __version__,
            "qcompile.pipeline": job.pipeline,
            "qcompile.target": job.target.name,
            "qcompile.scheme": job.scheme.name,
            "qcompile.source": digest,
            "qcompile.facts": json.dumps(sorted(f.value for f in facts)),
        }
    )
    if data is not None:
        note = {"samples": len(data), "fingerprint": data.fingerprint(), "random": bool(getattr(data, "random", False))}
        model.metadata["qcompile.calibration"] = json.dumps(note)
        model.metadata["qcompile.shapes"] = json.dumps(_shapes(data))
    model.ir.producer_name, model.ir.producer_version = "qcompile", __version__


def _shapes(data: Dataset) -> dict[str, list[int]]:
    feed = next(iter(data.take(1).batches(1)))
    return {name: list(array.shape) for name, array in feed.items()}


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
    words += ["--calib", job.data_source] if job.data_source else []
    words += ["--samples", str(job.options.samples)] if job.options.samples else []
    words += ["--preprocess", job.options.preprocess] if job.options.preprocess else []
    words += [w for p in job.options.keep_float for w in ("--keep-float", p)]
    words += [w for p in job.options.only for w in ("--only", p)]
    words += ["--seed", str(job.options.seed)] if job.options.seed else []
    return f"\n  reproduce: {shlex.join(words)}"


def write_report(result: Result, report: str | Path | None, remarks: str | Path | None) -> None:
    """Write the JSON report and the remarks, if asked for."""
    if report is not None:
        write_atomic(Path(report), json_text(result.to_json()) + "\n")
    if remarks is not None:
        document = {"schema_version": SCHEMA_VERSION, "remarks": [r.to_json() for r in result.remarks]}
        write_atomic(Path(remarks), json_text(document) + "\n")


def describe_plan(job: Job) -> list[tuple[str, str, bool]]:
    """(spec, help, inserted) of every pass that would run."""
    return [(format_pipeline([p]), first_line(p), i) for p, i in zip(job.plan.passes, job.plan.inserted, strict=True)]


def first_line(p: Pass | type[Pass]) -> str:
    """A pass's help."""
    return (p.__doc__ or "").strip().splitlines()[0]
