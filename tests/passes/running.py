"""Running passes as the tests do: the one place of the tests that knows how the runner is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.provider import Sweeps
from qcompile.calib.sweep.sweep import sweep
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.pipeline import registry
from qcompile.pipeline.base import Pass, PassContext
from qcompile.pipeline.planner import complete
from qcompile.pipeline.runner import Runner, drive
from qcompile.pipeline.spec import format_pipeline
from qcompile.quant.spec import SCHEMES
from qcompile.report import PassReport
from qcompile.target.catalog import TARGETS
from tests.passes.models import Feeds, fixture, fixture_arrays

Measure = Callable[[Model, Sequence[Probe[Any]]], dict[Probe[Any], Stat]]


def dataset(arrays: Feeds) -> Dataset:
    """Arrays in memory as a data set."""
    reader = ArrayReader(arrays, {n: a.dtype for n, a in arrays.items()}, {})
    return Dataset(reader, tuple(range(len(reader))), tuple(arrays), "made up", random=True)


def context(target: str = "ort", scheme: str = "w8a8", **options: Any) -> PassContext:
    """What a pass is told."""
    chosen = {k: options.pop(k) for k in ("keep_float", "only", "quantize", "bits") if k in options}
    return PassContext(SCHEMES[scheme], TARGETS[target], Selection(**chosen), **options)


@dataclass(frozen=True)
class Step:
    """A model in front of a pass and behind it, and what the pass said."""

    before: Model
    after: Model
    report: PassReport
    was: str = ""  # the digest of `before`, where it is known

    @cached_property
    def digests(self) -> tuple[str, str]:
        """What identifies the two models: nodes, constants, decisions."""
        return self.was or self.before.digest(), self.after.digest()

    @property
    def changed(self) -> bool:
        """Whether nodes, constants, or decisions differ."""
        return self.digests[0] != self.digests[1]


def run_passes(model: Model, passes: Sequence[Pass], arrays: Feeds, ctx: PassContext) -> tuple[Model, list[PassReport]]:
    """Run exactly these passes, with statistics and without verification."""
    return run_with(Sweeps(dataset(arrays), threads=1).collect, model, passes, ctx)


def run_with(measure: Measure, model: Model, passes: Sequence[Pass], ctx: PassContext) -> tuple[Model, list[PassReport]]:
    """Run exactly these passes, without verification; `measure` makes the sweeps."""
    return drive(Runner(verify="off").steps(model, passes, ctx), lambda needs: measure(needs.model, needs.probes))


def prefix(p: Pass, ctx: PassContext) -> tuple[Pass, ...]:
    """What the planner puts in front of a pass."""
    plan = complete([p], ctx.target, ctx.scheme)
    return plan.passes[: plan.inserted.index(False)]


def step(p: Pass, model: Model, arrays: Feeds, ctx: PassContext | None = None) -> Step:
    """`p` on `model`, behind the passes that it requires."""
    ctx = ctx or context()
    before, _ = run_passes(model, prefix(p, ctx), arrays, ctx)
    after, reports = run_passes(before, [p], arrays, ctx)
    return Step(before, after, reports[0])


@cache
def fixture_step(name: str, spec: str, target: str = "ort", scheme: str = "w8a8") -> Step:
    """A pass on an exporter fixture; what stands in front of it is run once for all passes."""
    (p,), ctx = registry.parse(spec), context(target, scheme)
    before, digest = _prefixed(name, format_pipeline(prefix(p, ctx)), target, scheme)
    after, reports = run_passes(before, [p], fixture_arrays(name), ctx)
    return Step(before, after, reports[0], digest)


@cache
def _prefixed(name: str, specs: str, target: str, scheme: str) -> tuple[Model, str]:
    """A model behind some passes, and its digest."""
    passes = registry.parse(specs)
    if not passes:
        return (model := fixture(name)), model.digest()
    front, _ = _prefixed(name, format_pipeline(passes[:-1]), target, scheme)
    model, _ = run_passes(front, passes[-1:], fixture_arrays(name), context(target, scheme))
    return model, model.digest()


def pipeline(text: str, model: Model, arrays: Feeds, ctx: PassContext) -> tuple[Model, list[PassReport]]:
    """A pipeline string, completed and run."""
    return run_passes(model, complete(registry.parse(text), ctx.target, ctx.scheme).passes, arrays, ctx)


@dataclass
class SweepOf:
    """Statistics measured on another model (a float64 twin has the same tensors, and no kernels)."""

    model: Model
    arrays: Feeds

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """Answers of the twin."""
        return sweep(self.model, dataset(self.arrays), probes, threads=1)


@cache
def builtin_passes() -> tuple[Pass, ...]:
    """Every registered pass with its default options."""
    return tuple(registry.pass_named(name) for name in registry.names())
