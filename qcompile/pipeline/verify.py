"""Each pass is held to the contract of its kind, on the outputs of a few samples; forms that stand together share one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qcompile.errors import VerifyError
from qcompile.ir.model import Model
from qcompile.pipeline.base import EQUIVALENT_TOLERANCE, Comparator, Comparison, Kind, Pass, PassResult
from qcompile.report import PassReport

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

    An EQUIVALENT pass is measured against the step before and held to 5e-6 of the outputs' size, LOWER against the float
    model.  Forms are compared once for all that follow each other; should they move the outputs, the first that does is found
    by bisection.  `failed` is told of a pass that broke its contract, with the model in front of it.
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
    widest: float = EQUIVALENT_TOLERANCE

    def meets(self, p: Pass, model: Model, reports: list[PassReport]) -> None:
        """`p` is about to run on `model`: forms that wait are compared before a pass that is none makes memory dear."""
        if not p.is_form():
            self._settle(model, reports)

    def saw(self, p: Pass, result: PassResult, before: Model, after: Model, reports: list[PassReport]) -> None:
        """`p` has run, between `before` and `after`; its report is the last of `reports`."""
        modified, exact = result.modified, result.tolerance <= EQUIVALENT_TOLERANCE
        self.widest = max(self.widest, result.tolerance)
        if self.comparator is None:
            if modified and p.changes_function:
                reports[-1] = replace(reports[-1], verified=_ON_PURPOSE)
            return
        if modified and p.is_form() and self.mode == "each" and exact:
            self.waiting.append(_Form(p, len(reports) - 1, before))
            return
        if p.changes_function and modified:
            self.source = after.clone()
            self.reference, self.step, self.fresh = None, None, True
            reports[-1] = replace(reports[-1], verified=_ON_PURPOSE)
        elif modified and p.kind in (Kind.EQUIVALENT, Kind.LOWER) and self.mode == "each":
            self._settle(before, reports)
            self._verify(p, before, after, reports, result.tolerance)
        elif modified and p.kind is not Kind.ANNOTATE:
            self.step, self.fresh = None, False

    def finish(self, passes: Sequence[Pass], end: Model, reports: list[PassReport]) -> None:
        """Behind the last pass."""
        if self.comparator is None or not passes:
            return
        self._settle(end, reports)
        if self.mode == "end":
            distance = self.comparator.compare(self.comparator.outputs(self.source), self.comparator.outputs(end))
            if all(p.kind in (Kind.EQUIVALENT, Kind.ANNOTATE) for p in passes):
                self._hold("the whole pipeline", passes[-1], distance, self.source, self.widest)
            reports[-1] = _measured(reports[-1], "compared at the end", distance)

    def _verify(self, p: Pass, before: Model, after: Model, reports: list[PassReport], tolerance: float) -> None:
        assert self.comparator is not None
        expected = self._known(before) if p.kind is Kind.EQUIVALENT else self._reference()
        self.step, self.fresh = self.comparator.outputs(after), False
        distance = self.comparator.compare(expected, self.step)
        if p.kind is Kind.EQUIVALENT:
            self._hold(f"pass {reports[-1].spec!r}", p, distance, before, tolerance)
        reports[-1] = _measured(reports[-1], _verdict(p.kind), distance)

    def _settle(self, after: Model, reports: list[PassReport]) -> None:
        """Compare the forms that wait, all at once: `after` is the model behind the last of them."""
        if not self.waiting or self.comparator is None:
            return
        expected, forms = self._known(self.waiting[0].before), self.waiting
        self.waiting, self.step, self.fresh = [], self.comparator.outputs(after), False
        distance = self.comparator.compare(expected, self.step)
        if not _holds(distance):
            form, distance = self._culprit(forms, after, expected, distance)
            self._hold(f"pass {reports[form.index].spec!r}", form.p, distance, form.before)
        for form in forms:
            reports[form.index] = _measured(reports[form.index], _verdict(Kind.EQUIVALENT), distance)

    def _culprit(self, forms: list[_Form], after: Model, expected: Any, distance: Comparison) -> tuple[_Form, Comparison]:
        """The first form behind which the outputs differ, and how far: by bisection."""
        assert self.comparator is not None
        low, high = 0, len(forms) - 1
        while low < high:
            middle = (low + high) // 2
            there = self.comparator.compare(expected, self.comparator.outputs(forms[middle + 1].before))
            if _holds(there):
                low = middle + 1
            else:
                high, distance = middle, there
        return forms[low], distance

    def _known(self, before: Model) -> Any:
        """The outputs in front of a pass, which are mostly those behind the one before."""
        assert self.comparator is not None
        if self.step is not None:
            return self.step
        return self._reference() if self.fresh else self.comparator.outputs(before)

    def _reference(self) -> Any:
        assert self.comparator is not None
        if self.reference is None:
            self.reference = self.comparator.outputs(self.source)
        return self.reference

    def _hold(self, what: str, p: Pass, distance: Comparison, before: Model, tolerance: float = EQUIVALENT_TOLERANCE) -> None:
        if _holds(distance, tolerance):
            return
        error = VerifyError(f"{what} moved the outputs by {distance.relative_error:.2g} of their size, more than {tolerance:g}")
        raise VerifyError(f"{error}{self.failed(p, before, error) or '; leave the pass out, or report it'}")


def _holds(distance: Comparison, tolerance: float = EQUIVALENT_TOLERANCE) -> bool:
    return bool(np.isfinite(distance.relative_error)) and distance.relative_error <= tolerance


def _measured(report: PassReport, verdict: str, distance: Comparison) -> PassReport:
    return replace(report, verified=verdict, relative_error=distance.relative_error, sqnr_db=distance.sqnr_db)


def _verdict(kind: Kind) -> str:
    return "equal within tolerance" if kind is Kind.EQUIVALENT else "compared with the float model"
