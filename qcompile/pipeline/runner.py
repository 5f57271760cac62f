"""Run a plan: gather statistics, apply, verify by kind, measure, and keep what is needed to reproduce a failure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import psutil

from qcompile.calib.observe import NotCarried, Probe, Stat, Told
from qcompile.calib.observe.change import AffineMap
from qcompile.errors import GateError, QcompileError, VerifyError
from qcompile.ir.model import Model
from qcompile.ir.verify import verify_structure
from qcompile.pipeline.base import Comparator, Comparison, Kind, Pass, PassContext, PassResult, StatisticsProvider
from qcompile.pipeline.spec import format_pass
from qcompile.report import PassReport, Remarks

VerifyMode = Literal["each", "end", "off"]
EQUIVALENT_TOLERANCE = 5e-6


@dataclass(frozen=True)
class Failure:
    """A pass that failed: the model just before it and the pass's spec, enough to run it again."""

    spec: str
    model: Model
    error: Exception


@dataclass
class Runner:
    """Runs passes one after the other on one model.

    `statistics` and `comparator` are injected; without a comparator nothing is compared.  `known` are statistics of the model
    that is run; passes carry them on or drop them.
    `on_pass(spec, index, total)` is told before each pass, `on_done(report, model)` after it.
    """

    statistics: StatisticsProvider | None = None
    comparator: Comparator | None = None
    verify: VerifyMode = "each"
    strict: bool = False
    on_pass: Callable[[str, int, int], None] = lambda spec, i, n: None
    on_done: Callable[[PassReport, Model], None] = lambda report, model: None
    on_failure: Callable[[Failure], str] = lambda failure: ""
    known: dict[Probe, Stat] = field(default_factory=dict[Probe, Stat])
    _outputs: Any = None
    _reference: tuple[Model, Any] | None = None
    _untouched: bool = True

    def run(
        self, model: Model, passes: Sequence[Pass], ctx: PassContext, *, strict_for: Sequence[bool] | None = None
    ) -> tuple[Model, list[PassReport]]:
        """Apply `passes` in order to a copy of `model`; returns the result and one report a pass.

        Raises:
            VerifyError: a pass broke its contract.
            GateError: under `strict`, a pass that the user wrote changed nothing.
        """
        reference, current = model, model.clone()
        segment_start = current.clone()
        reports: list[PassReport] = []
        for i, p in enumerate(passes):
            self.on_pass(format_pass(p), i, len(passes))
            before = current.clone()
            report, result = self._one(p, current, passes[i + 1 :], replace(ctx, remarks=Remarks(p.name)), before)
            if getattr(p, "changes_function", False) and result.modified:
                reference, segment_start, report = (
                    current.clone(),
                    current.clone(),
                    replace(report, verified="not verified: changes the function on purpose"),
                )
                self._outputs = None
            elif self._compares(p, result):
                report = self._verified(p, report, before, current, reference)
            elif result.modified and p.kind is not Kind.ANNOTATE:
                self._outputs = None
            self._untouched &= not result.modified or p.kind is Kind.ANNOTATE
            self._gate(report, strict_for[i] if strict_for else True)
            reports.append(report)
            self.on_done(report, current)
        if self.verify == "end" and self.comparator is not None and passes:
            reports = self._verify_end(reports, passes, segment_start, current)
        return current, reports

    def _one(
        self, p: Pass, model: Model, later: Sequence[Pass], ctx: PassContext, before: Model
    ) -> tuple[PassReport, PassResult]:
        start = time.perf_counter()
        try:
            ctx.told, ctx.statistics = Told(self._statistics(p, model, later, ctx)), self.statistics
            result = p.apply(model, ctx)
            if not result.modified and not ctx.remarks.all:
                ctx.remarks.note("", "no site matched")
            verify_structure(model, p.name)
        except Exception as e:
            hint = self.on_failure(Failure(format_pass(p), before, e))
            if isinstance(e, QcompileError):
                e.args = (f"{e}{hint}",)
                raise
            raise VerifyError(f"pass {p.name!r} failed: {type(e).__name__}: {e}{hint or '; please report it'}") from e
        self._carry(result)
        seconds, rss = time.perf_counter() - start, psutil.Process().memory_info().rss / 1e6
        return PassReport(format_pass(p), p.kind.value, result.modified, tuple(ctx.remarks.all), seconds, rss), result

    # statistics -----------------------------------------------------------------------------

    def _statistics(self, p: Pass, model: Model, later: Sequence[Pass], ctx: PassContext) -> dict[Probe, Stat]:
        wanted = dict.fromkeys(p.probes(model, ctx))
        missing = [probe for probe in wanted if probe not in self.known]
        if missing:
            if self.statistics is None:
                raise GateError(f"pass {p.name!r} needs calibration data; give some with --calib")
            early = [probe for probe in self._early(p, later, model, ctx) if probe not in self.known]
            self.known |= self.statistics.collect(model, list(dict.fromkeys([*missing, *early])))
        return {probe: self.known[probe] for probe in wanted}

    def _early(self, p: Pass, later: Sequence[Pass], model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Probes of later passes that will still hold when they run: one sweep answers them too."""
        scratch = replace(ctx, remarks=Remarks())
        moved = set(p.may_change(model, scratch))
        for q in later:
            for probe in q.probes(model, replace(scratch, remarks=Remarks(q.name))):
                if probe.tensor not in moved or probe.observer.follows:
                    yield probe
            moved |= set(q.may_change(model, scratch))

    def _carry(self, result: PassResult) -> None:
        """Keep statistics that the pass's changes of variable carry over exactly; drop the others."""
        for tensor, (source, change) in result.derived.items():
            for probe in [k for k in self.known if k.tensor == source]:
                self._keep(replace(probe, tensor=tensor), self.known[probe], change)
        for probe in [k for k in self.known if k.tensor in result.maps or k.tensor in result.changed]:
            stat = self.known.pop(probe)
            if probe.tensor in result.maps:
                self._keep(probe, stat, result.maps[probe.tensor])

    def _keep(self, probe: Probe, stat: Stat, change: AffineMap) -> None:
        with contextlib.suppress(NotCarried):
            self.known[probe] = stat.mapped(change.t, change.r)

    # verification ---------------------------------------------------------------------------

    def _compares(self, p: Pass, result: PassResult) -> bool:
        return (
            self.verify == "each" and self.comparator is not None and result.modified and p.kind in (Kind.EQUIVALENT, Kind.LOWER)
        )

    def _verified(self, p: Pass, report: PassReport, before: Model, after: Model, reference: Model) -> PassReport:
        assert self.comparator is not None
        if self._reference is None or self._reference[0] is not reference:
            self._reference = (reference, self.comparator.outputs(reference))
        if p.kind is Kind.EQUIVALENT:
            expected = self._outputs or (self._reference[1] if self._untouched else self.comparator.outputs(before))
        else:
            expected = self._reference[1]
        self._outputs = self.comparator.outputs(after)
        distance = self.comparator.compare(expected, self._outputs)
        if p.kind is Kind.EQUIVALENT:
            self._hold(report.spec, distance, before)
        return replace(report, verified=_verdict(p.kind), relative_error=distance.relative_error, sqnr_db=distance.sqnr_db)

    def _hold(self, spec: str, distance: Comparison, before: Model) -> None:
        if np.isfinite(distance.relative_error) and distance.relative_error <= EQUIVALENT_TOLERANCE:
            return
        error = VerifyError(
            f"pass {spec!r} moved the outputs by {distance.relative_error:.2g} of their size, more than {EQUIVALENT_TOLERANCE:g}"
        )
        hint = self.on_failure(Failure(spec, before, error))
        raise VerifyError(f"{error}{hint or '; leave the pass out, or report it'}")

    def _verify_end(self, reports: list[PassReport], passes: Sequence[Pass], start: Model, end: Model) -> list[PassReport]:
        assert self.comparator is not None
        distance = self.comparator.compare(self.comparator.outputs(start), self.comparator.outputs(end))
        if all(p.kind in (Kind.EQUIVALENT, Kind.ANNOTATE) for p in passes):
            self._hold("the whole pipeline", distance, start)
        reports[-1] = replace(
            reports[-1], verified="compared at the end", relative_error=distance.relative_error, sqnr_db=distance.sqnr_db
        )
        return reports

    def _gate(self, report: PassReport, by_user: bool) -> None:
        if self.strict and by_user and not report.modified:
            reasons = "; ".join(dict.fromkeys(r.reason for r in report.remarks)) or "no site matched"
            raise GateError(f"--strict: pass {report.spec!r} changed nothing ({reasons}); remove it, or drop --strict")


def _verdict(kind: Kind) -> str:
    return "equal within tolerance" if kind is Kind.EQUIVALENT else "compared with the float model"
