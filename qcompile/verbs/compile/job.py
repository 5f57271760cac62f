"""Everything resolved before a compilation runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.calib.data.dataset import find_beside, fixed_batch
from qcompile.decide.imports import own_scheme
from qcompile.errors import ModelError, UsageError
from qcompile.ir.model import Model
from qcompile.ir.quantizers import is_quantized
from qcompile.pipeline import registry
from qcompile.pipeline.base import PassContext
from qcompile.pipeline.planner import Plan, complete
from qcompile.pipeline.spec import format_pipeline, parse_items, with_option
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.target.catalog import DEFAULT, TARGETS
from qcompile.target.target import Target
from qcompile.verbs.build import gpu_list, require_engine
from qcompile.verbs.compile.options import Options, StatisticsOptions
from qcompile.verbs.guards import require_batch, require_numbers, require_operators, require_place, require_selectors, same_file
from qcompile.verbs.libraries import load_libraries
from qcompile.verbs.options import checked, part


@dataclass(frozen=True)
class Job:
    """A compilation that is ready to run: everything resolved, nothing done."""

    model: Model
    options: Options
    target: Target
    scheme: Scheme
    plan: Plan
    data_source: str | None

    @property
    def pipeline(self) -> str:
        """The completed pipeline as its canonical string."""
        return format_pipeline(self.plan.passes)

    @property
    def output(self) -> Path:
        """Where the model goes."""
        stem = self.model.path.stem if self.model.path is not None else "model"
        return self.options.output or Path(f"{stem}.{self.target.name}-{self.scheme.name}.onnx")

    def context(self) -> PassContext:
        """What every pass is told."""
        return PassContext(self.scheme, self.target, self.options.selection, seed=self.options.seed)


def prepare(path: str | Path, options: StatisticsOptions) -> Job:
    """Load the model, resolve conventions beside it, and complete the pipeline.

    Raises:
        ModelError, UsageError: the model or an option cannot be used.
    """
    source, options = Path(path), checked(options)
    load_libraries(options)
    model = Model.load(source)
    _require_floats(model, path)
    asked = options if isinstance(options, Options) else Options(**vars(part(options, StatisticsOptions)))
    if asked.min_sqnr is not None and asked.verify == "off":
        raise UsageError("--min-sqnr needs a comparison with the float model; drop --verify off")
    require_selectors(asked.selection.by_option)
    target, scheme, plan = _planned(model, asked)
    if not plan.passes and not asked.exact:
        raise ModelError(
            f"{path} already went through the whole pipeline for {target.name} and {scheme.name}; start from the float model"
        )
    require_numbers(model, path)
    require_batch(asked.batch, fixed_batch(model.inputs()))
    job = Job(model, asked, target, scheme, plan, asked.calib or find_beside(path))
    if isinstance(options, Options):
        _require_places(job, source)
    return job


def _require_places(job: Job, source: Path) -> None:
    """Fail before the work on files that could not be written after it, and on an engine that cannot be built."""
    options, output, inputs = job.options, job.output, _files_read(job)
    if same_file(output, source):
        raise UsageError(f"the output {output} is the input; choose another name with -o")
    require_place(output, "the output", inputs)
    taken, gpus = [source, output, *inputs], gpu_list(options.gpu)
    for out, what in ((options.engine, "the engine"), (options.report, "the report"), (options.remarks, "the remarks file")):
        require_place(out, what, taken)
        taken += [] if out is None else [out]
    if options.profiles and options.engine is None:
        raise UsageError("--profile is of an engine; add --engine OUT")
    if options.engine is not None:
        _require_engine(job, options.engine, gpus)


def _files_read(job: Job) -> list[Path]:
    """Files of the user's beside the model that the job reads."""
    named = [job.data_source, job.options.stats, job.options.preprocess]
    return [p for p in (Path(n) for n in named if n is not None) if p.is_file()]


def _require_engine(job: Job, engine: Path, gpus: tuple[str, ...]) -> None:
    if job.scheme.simulated:
        raise UsageError(f"no engine computes in {job.scheme.name}, it is only simulated; drop --engine, or choose --scheme w8a8")
    codes = [t.name for t in (job.scheme.weight, job.scheme.activation) if t is not None]
    require_engine(job.target.name, engine, gpus, codes)


def _planned(model: Model, options: Options) -> tuple[Target, Scheme, Plan]:
    target, quantized = TARGETS[options.target or DEFAULT], is_quantized(model.graph)
    scheme = SCHEMES[options.scheme or (own_scheme(model, target.schemes) if quantized else "w8a8")]
    target.require(scheme)
    require_operators(model, target)
    if options.bits and not target.mixed_widths:
        able = " or ".join(t.name for t in TARGETS.values() if t.mixed_widths)
        raise UsageError(f"--bits sets widths of integer-only models; use --target {able}, or --scheme for all of {target.name}")
    text = options.passes if options.passes is not None else target.default(scheme)
    user = registry.parse(f"dequantize,{text}".rstrip(",") if options.requantize else text)
    for p in user:
        scheme = p.scheme_for(scheme)
    done = () if quantized else done_passes(model)
    plan = complete(user, target, scheme, exact=options.exact, done=done, quantized=quantized)
    return target, scheme, _with_range(plan, options.range)


def _with_range(plan: Plan, method: str | None) -> Plan:
    """`method` as the `range` of every pass that has this option.

    Raises:
        UsageError: no pass has it, or the pipeline names another method.
    """
    if method is None:
        return plan
    found = [with_option(p, "range", method) for p in plan.passes]
    if not any(found):
        raise UsageError("--range is of activations and this pipeline decides on none; leave it out")
    return replace(plan, passes=tuple(new or p for new, p in zip(found, plan.passes, strict=True)))


def _require_floats(model: Model, path: str | Path) -> None:
    if "qcompile.integer" in model.metadata:
        raise ModelError(f"{path} computes with integers alone, which cannot be read back; start from the float model")


def done_passes(model: Model) -> tuple[str, ...]:
    """Names of the passes that an earlier run left its mark of in the file."""
    text = model.metadata.get("qcompile.pipeline", "")
    try:
        return tuple(item.name for item in parse_items(text))
    except UsageError as e:
        raise ModelError(
            f"the model's metadata entry qcompile.pipeline is no pipeline ({text[:40]!r});"
            " remove it or start from the float model"
        ) from e
