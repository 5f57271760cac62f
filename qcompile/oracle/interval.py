"""Intervals of exact Python integers, one for a whole tensor or one along some of its axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[Any]  # object arrays of Python integers: no bound of the analysis can itself overflow
DETAIL = 1 << 16  # a constant with more elements counts as one interval


@dataclass(frozen=True, eq=False)
class Range:
    """lo <= x <= hi elementwise; `lo` and `hi` broadcast to the tensor, so shape [] is one interval for all of it."""

    lo: Ints
    hi: Ints

    @property
    def low(self) -> int:
        """The smallest element of `lo`."""
        return int(self.lo.min()) if self.lo.size else 0

    @property
    def high(self) -> int:
        """The largest element of `hi`."""
        return int(self.hi.max()) if self.hi.size else 0

    @property
    def hull(self) -> Range:
        """One interval for the whole tensor."""
        return between(self.low, self.high)

    @property
    def uniform(self) -> bool:
        """Whether there is one interval only."""
        return self.lo.size == 1 and self.hi.size == 1

    def within(self, low: int, high: int) -> bool:
        """Whether every element lies in [low, high]."""
        return low <= self.low and self.high <= high

    def at_rank(self, rank: int) -> Range:
        """The same with `rank` axes; a list of axes that does not fit becomes one interval."""
        if self.lo.ndim > rank:
            return self.hull
        return Range(_raised(self.lo, rank), _raised(self.hi, rank))


def _raised(a: Ints, rank: int) -> Ints:
    return a.reshape((1,) * (rank - a.ndim) + a.shape)


def exact(values: ArrayLike) -> Ints:
    """Python integers in an object array."""
    array = np.asarray(values)
    return array if array.dtype == object else np.asarray(array.astype(object))


def between(low: int, high: int) -> Range:
    """One interval."""
    return Range(exact(np.array(low, object)), exact(np.array(high, object)))


def constant(array: NDArray[Any]) -> Range:
    """A known tensor: element by element while it is small, else from its smallest to its largest element."""
    if array.size == 0:
        return between(0, 0)
    if array.size > DETAIL:
        return between(int(array.min()), int(array.max()))
    values = exact(array.astype(np.int64) if array.dtype.kind == "b" else array)
    return Range(values, values)


def join(ranges: Iterable[Range]) -> Range:
    """The smallest range that holds all of them, elementwise."""
    return reduce(lambda a, b: Range(least(a.lo, b.lo), most(a.hi, b.hi)), ranges)


def least(a: Ints, b: Ints) -> Ints:
    """Elementwise minimum."""
    return exact(np.minimum(a, b))


def most(a: Ints, b: Ints) -> Ints:
    """Elementwise maximum."""
    return exact(np.maximum(a, b))


def corners(function: Callable[[Ints, Ints], Any], a: Range, b: Range) -> Range:
    """The image of a function that is monotone in each argument: its extremes lie at the four corners."""
    values = [exact(function(x, y)) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Range(reduce(least, values), reduce(most, values))


def monotone(function: Callable[[Ints], Any], a: Range) -> Range:
    """The image of a function that never falls."""
    return Range(exact(function(a.lo)), exact(function(a.hi)))


def times_count(a: Range, fewest: int, count: int) -> Range:
    """The sum of `fewest` to `count` elements, each anywhere in `a`."""
    ends = Range(exact(np.array(fewest, object)), exact(np.array(count, object)))
    return corners(lambda x, n: x * n, a, ends)


def truncated(a: Ints, b: Ints) -> Ints:
    """a / b toward zero."""
    sign = 1 - 2 * exact(np.not_equal(a < 0, b < 0).astype(np.int64))
    return exact(exact(np.abs(a) // np.abs(b)) * sign)
