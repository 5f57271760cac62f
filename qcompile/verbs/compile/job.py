"""What a compilation is asked to do, and everything resolved before it runs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qcompile.calib.data.dataset import find_beside, fixed_batch
from qcompile.errors import ModelError, UsageError
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.pipeline import registry
from qcompile.pipeline.base import Pass, PassContext
from qcompile.pipeline.planner import Plan, complete
from qcompile.pipeline.runner import VerifyMode
from qcompile.pipeline.spec import format_pipeline, near, parse_items
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.report import PassReport
from qcompile.target.catalog import DEFAULT, TARGETS
from qcompile.target.target import Target
from qcompile.verbs.guards import require_batch, require_numbers, require_sane

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
    stats: str | Path | None = None
    samples: int | None = None
    batch: int | None = None
    preprocess: str | None = None
    output: str | Path | None = None
    verify: VerifyMode = "each"
    keep_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()
    exact: bool = False
    strict: bool = False
    seed: int = 0
    threads: int | None = None
    min_sqnr: float | None = None
    mem_limit: int | None = None
    range: str | None = None
    print_after: bool = False

    @property
    def selection(self) -> Selection:
        """The selectors of nodes."""
        return Selection(self.keep_float, self.only, self.quantize, self.bits)


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

    def context(self) -> PassContext:
        """What every pass is told."""
        return PassContext(self.scheme, self.target, self.options.selection, seed=self.options.seed)


def prepare(path: str | Path, options: Options) -> Job:
    """Load the model, resolve conventions beside it, and complete the pipeline.

    Raises:
        ModelError, UsageError: the model or an option cannot be used.
    """
    model = Model.load(path)
    options = _with_sidecar(Path(path), options)
    require_sane(options.samples, options.seed, options.selection.by_option)
    if options.min_sqnr is not None and options.verify == "off":
        raise UsageError("--min-sqnr needs a comparison with the float model; drop --verify off")
    target, scheme = _target(options.target or DEFAULT), _scheme(options.scheme or "w8a8")
    target.require(scheme)
    if options.bits and not target.mixed_widths:
        able = " or ".join(t.name for t in TARGETS.values() if t.mixed_widths)
        raise UsageError(f"--bits sets widths of integer-only models; use --target {able}, or --scheme for all of {target.name}")
    text = options.passes if options.passes is not None else target.default(scheme)
    user = registry.parse(text)
    for p in user:
        scheme = p.scheme_for(scheme)
    plan = _with_range(complete(user, target, scheme, exact=options.exact, done=done_passes(model)), options.range)
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
    require_batch(options.batch, fixed_batch(model.inputs()))
    return Job(model, options, target, scheme, plan, output, options.calib or find_beside(path))


def _with_range(plan: Plan, method: str | None) -> Plan:
    """`method` as the `range` of `annotate`.

    Raises:
        UsageError: nothing is annotated, or the pipeline names another method.
    """
    if method is None:
        return plan
    chosen = [getattr(p, "range_", None) for p in plan.passes if p.name == "annotate"]
    if not chosen:
        raise UsageError("--range is of activations and this pipeline decides on none; leave it out")
    if any(c not in ("auto", method) for c in chosen):
        raise UsageError(f"--range {method} and annotate{{range={chosen[0]}}} differ; give one of them")
    changed: Any = {"range_": method}
    return replace(plan, passes=tuple(replace(p, **changed) if p.name == "annotate" else p for p in plan.passes))


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


def describe_plan(job: Job) -> list[tuple[str, str, bool]]:
    """(spec, help, inserted) of every pass that would run."""
    return [(format_pipeline([p]), first_line(p), i) for p, i in zip(job.plan.passes, job.plan.inserted, strict=True)]


def first_line(p: Pass | type[Pass]) -> str:
    """A pass's help."""
    return (p.__doc__ or "").strip().splitlines()[0]
