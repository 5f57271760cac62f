"""From the outputs of one batch to the batch's statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.extrema import AbsMax, MinMax
from qcompile.calib.finite import require_finite
from qcompile.calib.histogram import Histogram, bin_exponent, bin_span
from qcompile.calib.instrument import Instrumented
from qcompile.calib.observers import Probe, Stat
from qcompile.calib.rows import Extremes, Rows, RowsStat
from qcompile.calib.sums import Moments, SecondMoment
from qcompile.ir.model import Model

Arrays = dict[str, NDArray[Any]]
_SPAN = 1 << 16
_INDEX = 1 << 30
_LEAST = -120


@dataclass(frozen=True)
class Batch:
    """The outputs of one run on `held` samples from number `first` on, in chunk `chunk`, with codes scaled by 2^-exponents."""

    plan: Instrumented
    found: Arrays
    exponents: Mapping[str, int]
    first: int
    held: int
    chunk_first: int

    def statistic(self, probe: Probe, known: Stat) -> Stat:
        """This batch's statistic; `known` is what it will be merged into."""
        observer, key = probe.observer, probe.tensor
        match observer:
            case MinMax(axis) | AbsMax(axis) if (key, axis) in self.plan.extremes:
                return observer.of_extremes(*self._extremes(key, axis))
            case Extremes() if (key, "rows") in self.plan.extremes:
                return observer.of_extremes(*self._extremes(key, "rows"), self.first, self.held)
            case Moments(axis) if (key, axis) in self.plan.sums:
                names = self.plan.sums[key, axis]
                size = int(self.found[names.size])
                return observer.of_sums(size, self.found[names.total], self.found[names.squares], self.chunk_first)
            case SecondMoment(weights) if (key, weights) in self.plan.products:
                product = self.plan.products[key, weights]
                return observer.of_product(int(self.found[product.rows].flat[0]), self.found[product.xtx], self.chunk_first)
            case Histogram() if key in self.plan.codes:
                lo, hi = self._extremes(key, None)
                return observer.of_codes(self.found[self.plan.codes[key].codes], self.exponents[key], float(lo), float(hi))
            case _:
                return self._of_raw(probe, known)

    def require_finite(self, model: Model, fetch: Callable[[str], NDArray[Any]]) -> None:
        """Look at a tensor itself where a reduction of it is not finite: the sum of finite values may overflow.

        Raises:
            DataError: NaN or infinite values.
        """
        for tensor, output in self.plan.raw.items():
            if tensor in self.plan.unchecked:
                continue
            require_finite(model, tensor, self.found[output], self.first)
        for tensor, names in self._reduced():
            if not all(np.isfinite(self.found[n]).all() for n in names):
                require_finite(model, tensor, fetch(tensor), self.first)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Extremes of the tensors that have codes."""
        found = {t: self._extremes(t, None) for t in self.plan.codes}
        return {t: (float(lo), float(hi)) for t, (lo, hi) in found.items()}

    def _extremes(self, tensor: str, keep: int | str | None) -> tuple[NDArray[Any], NDArray[Any]]:
        names = self.plan.extremes[tensor, keep]
        return self.found[names.lo], self.found[names.hi]

    def _reduced(self) -> list[tuple[str, tuple[str, ...]]]:
        plan = self.plan
        extremes = [(k[0], tuple(n for n in (e.lo, e.hi, e.total) if n is not None)) for k, e in plan.extremes.items()]
        sums = [(k[0], (s.total, s.squares)) for k, s in plan.sums.items()]
        return [*extremes, *sums, *((k[0], (p.xtx,)) for k, p in plan.products.items())]

    def _of_raw(self, probe: Probe, known: Stat) -> Stat:
        """A sample of rows copies only those that can enter it; a weighted moment needs the weights."""
        observer, array = probe.observer, self.found[self.plan.raw[probe.tensor]]
        if isinstance(observer, Rows) and isinstance(known, RowsStat):
            return observer.observe(array, self.first, self.held, known)
        if isinstance(observer, SecondMoment) and observer.weights is not None:
            weights = self.found[self.plan.raw[observer.weights]]
            return observer.observe(array, self.chunk_first, 1, weights)
        if isinstance(observer, Moments | SecondMoment):
            return observer.observe(array, self.chunk_first, 1)
        return observer.observe(array, self.first, self.held)


class CodeScales:
    """The exponents that the graph's codes are scaled by: those of the range so far, so that counts can be merged.

    Codes hold the right answer whenever they are not coarser than the bins of the joint range and not too many; a batch
    that breaks this is run again with the exponents that it needs.
    """

    def __init__(self, bins: Mapping[str, int], ranges: Mapping[str, tuple[float, float]]) -> None:
        self._bins, self.ranges = dict(bins), dict(ranges)
        self.exponents = {t: self._wanted(t, *self.ranges.get(t, (0.0, 0.0))) for t in bins}

    def misfits(self, ranges: Mapping[str, tuple[float, float]]) -> tuple[bool, set[str]]:
        """Whether the batch has to run again, and which tensors no exponent in the graph's reach can serve."""
        again, unreachable = False, set[str]()
        for tensor, (lo, hi) in ranges.items():
            joint = self._joint(tensor, lo, hi)
            if lo == hi == 0.0 or self._fits(tensor, self.exponents[tensor], lo, hi, joint):
                continue
            again, self.exponents[tensor] = True, self._wanted(tensor, *joint)
            if not self._fits(tensor, self.exponents[tensor], lo, hi, joint):
                unreachable.add(tensor)
        return again, unreachable

    def advance(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Take a batch's extremes into the running range; the next batch is scaled for it."""
        for tensor, (lo, hi) in ranges.items():
            self.ranges[tensor] = self._joint(tensor, lo, hi)
        self.exponents = {t: self._wanted(t, *self.ranges[t]) for t in ranges}

    def _joint(self, tensor: str, lo: float, hi: float) -> tuple[float, float]:
        known = self.ranges.get(tensor)
        return (lo, hi) if known is None else (min(lo, known[0]), max(hi, known[1]))

    def _wanted(self, tensor: str, lo: float, hi: float) -> int:
        """Upwards only: a float32 scaled down may lose what tells it from zero."""
        return 0 if lo == hi == 0.0 else min(max(bin_exponent(lo, hi, self._bins[tensor]), _LEAST), 0)

    def _fits(self, tensor: str, exponent: int, lo: float, hi: float, joint: tuple[float, float]) -> bool:
        first, length = bin_span(lo, hi, exponent)
        return exponent <= bin_exponent(*joint, self._bins[tensor]) and length <= _SPAN and abs(first) + length < _INDEX
