"""From the outputs of one batch to the batch's statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import Probe, Stat
from qcompile.calib.observe.chunks import CHUNK
from qcompile.calib.observe.extrema import AbsMax, AbsMaxStat, MinMax, MinMaxStat
from qcompile.calib.observe.histogram import Histogram, HistogramStat
from qcompile.calib.observe.rows import Extremes, Rows, RowsStat
from qcompile.calib.observe.sums import Moments, SecondMoment, SecondMomentStat
from qcompile.calib.sweep.finite import require_finite
from qcompile.calib.sweep.instrument import Instrumented
from qcompile.ir.model import Model

Arrays = dict[str, NDArray[Any]]
S = TypeVar("S", bound=Stat)


@dataclass(frozen=True)
class Batch:
    """The outputs of one run on `held` samples from number `first` on, in the chunk that starts at `chunk_first`."""

    plan: Instrumented
    found: Arrays
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
            case _:
                return self._of_raw(probe, known)

    def merged(self, probe: Probe, known: Stat, reuse: bool) -> Stat | None:
        """`known` with this batch, for the observers that add to a statistic at once; `reuse` lets it be overwritten."""
        observer = probe.observer
        if isinstance(observer, SecondMoment) and isinstance(known, SecondMomentStat):
            weights = None if observer.weights is None else self._raw(observer.weights)
            return observer.added(known, self._raw(probe.tensor), self.chunk_first // CHUNK, weights, reuse)
        if isinstance(observer, Histogram) and isinstance(known, HistogramStat):
            return self._finite(probe.tensor, lambda array: observer.added(known, array))
        return None

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

    def _extremes(self, tensor: str, keep: int | str | None) -> tuple[NDArray[Any], NDArray[Any]]:
        names = self.plan.extremes[tensor, keep]
        return self.found[names.lo], self.found[names.hi]

    def _reduced(self) -> list[tuple[str, tuple[str, ...]]]:
        plan = self.plan
        extremes = [(k[0], tuple(n for n in (e.lo, e.hi, e.total) if n is not None)) for k, e in plan.extremes.items()]
        sums = [(k[0], (s.total, s.squares)) for k, s in plan.sums.items()]
        return [*extremes, *sums]

    def _of_raw(self, probe: Probe, known: Stat) -> Stat:
        """A sample of rows copies only those that can enter it."""
        observer, array = probe.observer, self._raw(probe.tensor)
        if isinstance(observer, Rows) and isinstance(known, RowsStat):
            return observer.observe(array, self.first, self.held, known)
        if isinstance(observer, Moments):
            return observer.observe(array, self.chunk_first, 1)
        if isinstance(observer, MinMax | AbsMax):
            return self._finite(probe.tensor, lambda array: _with_ends(observer.observe(array)))
        return observer.observe(array, self.first, self.held)

    def _finite(self, tensor: str, reduce: Callable[[NDArray[Any]], S]) -> S:
        """A reduction that raises ValueError on what is not finite; the error that leaves names the tensor."""
        try:
            return reduce(self._raw(tensor))
        except ValueError:
            require_finite(self.plan.model, tensor, self._raw(tensor), self.first)
            raise

    def _raw(self, tensor: str) -> NDArray[Any]:
        return self.found[self.plan.raw[tensor]]


def _with_ends(stat: MinMaxStat | AbsMaxStat) -> MinMaxStat | AbsMaxStat:
    if not (np.isfinite(stat.lo).all() and np.isfinite(stat.hi).all()):
        raise ValueError("NaN or infinite values")
    return stat
