"""Extremes of a tensor, of its channels or of its heads: exact under every partition of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.calib.observe.observer import Observer, Reduction, Seen
from qcompile.calib.observe.stat import NotCarried, Stat, by_head, other_axes, width

F64 = NDArray[np.float64]
_OPERATORS = ("ReduceMin", "ReduceMax")


@dataclass(frozen=True, eq=False)
class MinMaxStat(Stat):
    """Exact extremes `lo` <= `hi`, float64 of shape [], [C] or [heads]; +inf and -inf before any data."""

    lo: F64
    hi: F64

    def merge(self, other: Self) -> Self:
        """Extremes over both."""
        return replace(self, lo=np.minimum(self.lo, other.lo), hi=np.maximum(self.hi, other.hi))

    def mapped(self, t: ArrayLike, r: ArrayLike) -> Self:
        """Extremes of x' = (x - t) / r; per-channel `t` and `r` [C] need a per-channel statistic; r may be negative.

        Raises:
            NotCarried: per-channel map of a per-tensor statistic.
        """
        shift, ratio = np.asarray(t, np.float64), np.asarray(r, np.float64)
        if np.broadcast_shapes(shift.shape, ratio.shape, self.lo.shape) != self.lo.shape:
            raise NotCarried("a per-channel map cannot be followed by a per-tensor min-max")
        a, b = (self.lo - shift) / ratio, (self.hi - shift) / ratio
        return replace(self, lo=np.minimum(a, b), hi=np.maximum(a, b))


@dataclass(frozen=True)
class MinMax(Observer[MinMaxStat]):
    """Extremes of the tensor, of each channel of `axis`, or of each of `heads` equal groups of channels of `axis`.

    Those of the tensor are found outside the graph: NumPy is faster than Reduce operators over all axes (ADR 003).
    """

    kind: ClassVar[str] = "minmax"
    infinities: ClassVar = "refused"
    axis: int | None = None
    heads: int | None = None

    def empty(self) -> MinMaxStat:
        return MinMaxStat(np.asarray(np.inf), np.asarray(-np.inf))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> MinMaxStat:
        if not array.size:
            return self.empty()
        axes = other_axes(array.ndim, self.axis)
        return self.of_extremes(array.min(axes), array.max(axes))

    @property
    def follows(self) -> bool:
        return self.axis is not None and self.heads is None

    def in_graph(self, rank: int) -> Reduction | None:
        return None if self.axis is None else Reduction(_OPERATORS, other_axes(rank, self.axis))

    def from_batch(self, seen: Seen) -> MinMaxStat:
        if seen.reduced:
            return self.of_extremes(*seen.arrays)
        return _finite(self.observe(seen.arrays[0])) if seen.arrays[0].size else self.empty()

    def nbytes(self, shape: Sequence[int]) -> int:
        return 64 * width(shape, self.axis)

    def of_extremes(self, lo: ArrayLike, hi: ArrayLike) -> MinMaxStat:
        """The statistic from the extremes of the tensor or of each channel, however they were reduced."""
        low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
        if self.heads is not None:
            low, high = by_head(low, self.heads).min(-1), by_head(high, self.heads).max(-1)
        return MinMaxStat(low, high)


@dataclass(frozen=True, eq=False)
class AbsMaxStat(Stat):
    """Exact largest magnitude, float64 of shape [], [C] or [heads]; 0 before any data."""

    amax: F64

    @property
    def lo(self) -> F64:
        """The symmetric range's lower end."""
        return -self.amax

    @property
    def hi(self) -> F64:
        """The symmetric range's upper end."""
        return self.amax

    def merge(self, other: Self) -> Self:
        """Largest magnitude over both."""
        return replace(self, amax=np.maximum(self.amax, other.amax))


@dataclass(frozen=True)
class AbsMax(Observer[AbsMaxStat]):
    """Largest magnitude of the tensor, of each channel of `axis`, or of each of `heads` groups of channels of `axis`."""

    kind: ClassVar[str] = "absmax"
    infinities: ClassVar = "refused"
    axis: int | None = None
    heads: int | None = None

    @property
    def _signed(self) -> MinMax:
        return MinMax(self.axis, self.heads)

    def empty(self) -> AbsMaxStat:
        return AbsMaxStat(np.asarray(0.0))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> AbsMaxStat:
        return _absmax(self._signed.observe(array)) if array.size else self.empty()

    def in_graph(self, rank: int) -> Reduction | None:
        return self._signed.in_graph(rank)

    def from_batch(self, seen: Seen) -> AbsMaxStat:
        return _absmax(self._signed.from_batch(seen))

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._signed.nbytes(shape)


def _finite(stat: MinMaxStat) -> MinMaxStat:
    if not (np.isfinite(stat.lo).all() and np.isfinite(stat.hi).all()):
        raise ValueError("NaN or infinite values")
    return stat


def _absmax(stat: MinMaxStat) -> AbsMaxStat:
    """The largest magnitude that extremes imply."""
    return AbsMaxStat(np.maximum(np.maximum(-stat.lo, stat.hi), 0.0))
