"""Each pass is held to the contract of its kind, on the outputs of a few samples; forms that stand together share one run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qcompile.errors import VerifyError
from qcompile.ir.loosen import loosened
from qcompile.ir.model import Model
from qcompile.ir.qoperators import spell_qdq
from qcompile.ir.quantizers import is_quantized
from qcompile.ir.select import exactly
from qcompile.pipeline.base import EQUIVALENT_TOLERANCE, Comparator, Comparison, Kind, Pass, PassResult
from qcompile.report import PassReport, listed

Again = Callable[[Sequence[str]], Model | None]
NOISE_FACTOR = 8  # two forms of one function round independently, and the noise is measured once
_SITES = 3
_NOTHING_SMOOTH = "not verified: every output jumps or differs from run to run"
_ON_PURPOSE = "not verified: changes the function on purpose"


@dataclass(frozen=True)
class _Form:
    """A form that changed the model, not compared yet: its report's number, and the model in front of it."""

    p: Pass
    index: int
    before: Model


@dataclass
class Verifier:
    """Compares models as passes go by.

    An EQUIVALENT pass is measured against the step before and held to 5e-6 of the outputs' size, or to what rounding alone does
    to the model where that is more (measured once, and only then); LOWER against the float model.  Forms are compared once for
    all that follow each other; should they move the outputs, the first that does is found by bisection.  `failed` is told of a
    pass that broke its contract, with the model in front of it.
    Of a quantized source the reference is the source itself, its operators on codes computed exactly; EQUIVALENT passes are
    compared without rounding, which turns a small error into a step.  `inside`: the outputs of the float model in it.
    `step` are the outputs of the model in front of what waits, if they are known; `fresh` tells that it is still the source.
    """

    comparator: Comparator | None
    mode: str
    source: Model
    failed: Callable[[Pass, Model, Exception], str]
    waiting: list[_Form] = field(default_factory=list[_Form])
    reference: Any = None
    step: Any = None
    fresh: bool = True
    noise: Mapping[str, float] | None = None
    widest: float = EQUIVALENT_TOLERANCE
    quantized: bool = False
    inside: Any = None

    def __post_init__(self) -> None:
        self.quantized = self.comparator is not None and is_quantized(self.source.graph)
        if self.quantized:
            self.source = self.source.clone()
            spell_qdq(self.source)

    def meets(self, p: Pass, model: Model, reports: list[PassReport]) -> None:
        """`p` is about to run on `model`: forms that wait are compared before a pass that is none makes memory dear."""
        if not p.is_form():
            self._settle(model, reports)

    def saw(
        self,
        p: Pass,
        result: PassResult,
        before: Model,
        after: Model,
        reports: list[PassReport],
        again: Again,
    ) -> None:
        """`p` has run, between `before` and `after`; its report is the last of `reports`.  `again` runs it, nodes left alone."""
        modified, exact = result.modified, result.tolerance <= EQUIVALENT_TOLERANCE
        self.widest = max(self.widest, result.tolerance)
        if self.comparator is None:
            if modified and p.changes_function:
                reports[-1] = replace(reports[-1], verified=_ON_PURPOSE)
            return
        if modified and p.is_form() and self.mode == "each" and exact:
            self.waiting.append(_Form(p, len(reports) - 1, before))
            return
        if p.imports and modified:
            self._settle(before, reports)
            self._take_inside(after, reports)
        if p.changes_function and modified:
            self.source, self.quantized = after.clone(), False
            self.reference, self.step, self.noise, self.fresh = None, None, None, True
            reports[-1] = reports[-1] if p.imports else replace(reports[-1], verified=_ON_PURPOSE)
        elif modified and p.kind in (Kind.EQUIVALENT, Kind.LOWER) and self.mode == "each":
            self._settle(before, reports)
            self._verify(p, before, after, reports, result.tolerance, again)
        elif modified and (p.kind is not Kind.ANNOTATE or p.imports):
            self.step, self.fresh = None, False

    def finish(self, passes: Sequence[Pass], end: Model, reports: list[PassReport]) -> None:
        """Behind the last pass."""
        if self.comparator is None or not passes:
            return
        self._settle(end, reports)
        if self.mode == "end":
            exact = all(p.kind in (Kind.EQUIVALENT, Kind.ANNOTATE) for p in passes)
            loose = exact and self.quantized
            there = self._outputs(end) if loose else self.comparator.outputs(end)
            distance = self.comparator.compare(self._outputs(self.source) if loose else self._reference(), there)
            if exact:
                self._hold("the whole pipeline", passes[-1], distance, self.source, reports[-1], self.widest)
            reports[-1] = self._with_inside(_measured(reports[-1], "compared at the end", distance), there)

    def _verify(self, p: Pass, before: Model, after: Model, reports: list[PassReport], tolerance: float, again: Again) -> None:
        assert self.comparator is not None
        equivalent = p.kind is Kind.EQUIVALENT
        expected = self._known(before) if equivalent else self._reference()
        self.step, self.fresh = self._outputs(after) if equivalent else self.comparator.outputs(after), False
        distance = self.comparator.compare(expected, self.step)
        if p.kind is Kind.EQUIVALENT:
            site = None if self._holds(distance, tolerance) else self._first_site(reports[-1], expected, again, tolerance)
            self._hold(f"pass {reports[-1].spec!r}", p, distance, before, reports[-1], tolerance, site)
        reports[-1] = self._with_inside(_measured(reports[-1], _verdict(p.kind), distance), self.step)

    def _take_inside(self, after: Model, reports: list[PassReport]) -> None:
        """`after` is the float model inside the source: how far it stands from it, and what the end is compared with too."""
        assert self.comparator is not None
        outputs = self.comparator.outputs(after)
        distance = self.comparator.compare(self._reference(), outputs)
        reports[-1] = _measured(reports[-1], "the float model inside, beside the imported one", distance)
        self.inside = outputs if reports[-1].kind == Kind.ANNOTATE.value else None

    def _with_inside(self, report: PassReport, outputs: Any) -> PassReport:
        """The report with the distance to the float model inside a quantized source."""
        if self.inside is None or self.comparator is None or report.kind != Kind.LOWER.value:
            return report
        return replace(report, float_db=self.comparator.compare(self.inside, outputs).sqnr_db)

    def _outputs(self, model: Model) -> Any:
        """What EQUIVALENT passes are compared by."""
        assert self.comparator is not None
        return self.comparator.outputs(loosened(model) if self.quantized else model)

    def _settle(self, after: Model, reports: list[PassReport]) -> None:
        """Compare the forms that wait, all at once: `after` is the model behind the last of them."""
        if not self.waiting or self.comparator is None:
            return
        expected, forms = self._known(self.waiting[0].before), self.waiting
        self.waiting, self.step, self.fresh = [], self._outputs(after), False
        distance = self.comparator.compare(expected, self.step)
        if not self._holds(distance):
            form, distance = self._culprit(forms, after, expected, distance)
            report = reports[form.index]
            self._hold(f"pass {report.spec!r}", form.p, distance, form.before, report, EQUIVALENT_TOLERANCE)
        for form in forms:
            reports[form.index] = _measured(reports[form.index], _verdict(Kind.EQUIVALENT), distance)

    def _culprit(self, forms: list[_Form], after: Model, expected: Any, distance: Comparison) -> tuple[_Form, Comparison]:
        """The first form behind which the outputs differ, and how far: by bisection."""
        assert self.comparator is not None
        low, high = 0, len(forms) - 1
        while low < high:
            middle = (low + high) // 2
            there = self.comparator.compare(expected, self._outputs(forms[middle + 1].before))
            if self._holds(there):
                low = middle + 1
            else:
                high, distance = middle, there
        return forms[low], distance

    def _first_site(self, report: PassReport, expected: Any, again: Again, floor: float) -> str | None:
        """The first site whose rewrite moves the outputs, by bisection; None where leaving sites alone changes nothing."""
        comparator, sites = self.comparator, _worked_at(report)
        assert comparator is not None

        def stands(count: int) -> bool:
            made = again(sites[count:])
            return made is not None and self._holds(comparator.compare(expected, self._outputs(made)), floor)

        if not sites or not stands(0):
            return None
        low, high = 0, len(sites)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if stands(middle) else (low, middle)
        return sites[low]

    def _known(self, before: Model) -> Any:
        """The outputs in front of a pass, which are mostly those behind the one before."""
        assert self.comparator is not None
        if self.step is not None:
            return self.step
        return self._reference() if self.fresh and not self.quantized else self._outputs(before)

    def _reference(self) -> Any:
        assert self.comparator is not None
        if self.reference is None:
            self.reference = self.comparator.outputs(self.source)
        return self.reference

    def _hold(
        self, what: str, p: Pass, distance: Comparison, before: Model, report: PassReport, floor: float, site: str | None = None
    ) -> None:
        if self._holds(distance, floor):
            return
        name, error = max(distance.errors.items(), key=lambda item: item[1] / self._bound(item[0], floor))
        size = f"{error:.2g} of their size (output {name!r}), more than {self._bound(name, floor):.1g}"
        failure = VerifyError(f"{what} moved the outputs by {size}{_sites(report, site)}")
        told = self.failed(p, before, failure)
        raise VerifyError(f"{failure}; {_way_on(p, self.mode, site)}{told}")

    def _holds(self, distance: Comparison, floor: float = EQUIVALENT_TOLERANCE) -> bool:
        errors = distance.errors.items()
        if all(error <= floor for _, error in errors):
            return True
        return all(bool(np.isfinite(error)) and error <= self._bound(name, floor) for name, error in errors)

    def _bound(self, name: str, floor: float) -> float:
        """How far an output may move, relative to its size: `floor`, or more where the model's own noise is larger."""
        assert self.comparator is not None
        if self.noise is None:
            source = loosened(self.source) if self.quantized else self.source
            self.noise = self.comparator.noise(source, self.comparator.outputs(source) if self.quantized else self._reference())
        return max(floor, NOISE_FACTOR * self.noise.get(name, 0.0))


def _worked_at(report: PassReport) -> list[str]:
    return list(dict.fromkeys(r.node for r in report.remarks if r.kind == "applied" and r.node))


def _sites(report: PassReport, site: str | None) -> str:
    """Where the pass worked, in words; with the site at which the outputs moved, if it is known."""
    nodes = _worked_at(report)
    first = f"; the first site at which they move is {site!r}" if site is not None else ""
    return f" (it worked at {listed(nodes, _SITES)}{first})" if nodes else ""


def _way_on(p: Pass, mode: str, site: str | None) -> str:
    out = f"leave the site alone with --keep-float {shlex.quote(exactly(site))}, or " if site is not None else ""
    out += "name the passes without it and add --exact" if p.is_form() else "leave it out of --passes"
    return f"{out}, or --verify {'off compares nothing' if mode == 'end' else 'end compares only the finished model'}"


def _measured(report: PassReport, verdict: str, distance: Comparison) -> PassReport:
    if distance.relative_error is None and report.kind == Kind.EQUIVALENT.value:
        return replace(report, verified=_NOTHING_SMOOTH, outputs=distance.outputs)
    told = {"relative_error": distance.relative_error, "sqnr_db": distance.sqnr_db, "outputs": distance.outputs}
    return replace(report, verified=verdict, **told)


def _verdict(kind: Kind) -> str:
    return "equal within tolerance" if kind is Kind.EQUIVALENT else "compared with the float model"
