"""Observers: frozen descriptions of what to learn about a tensor; their results form a commutative monoid.

    observer.empty()                         the neutral element
    observer.observe(array, first, samples)  the statistic of one batch
    stat.merge(other)                        associative and commutative, so batches, sweeps and machines may be split at will

MinMax, AbsMax, Histogram and Rows give bit-identical results for every partition; Moments and SecondMoment are float64
sums, equal up to rounding (about 1e-15 relative).  Channel axes: -1 for token tensors, 1 for NCHW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.calib.histogram import Histogram, HistogramStat
from qcompile.calib.stat import NotCarried, Stat

__all__ = [
    "AbsMax",
    "AbsMaxStat",
    "Histogram",
    "HistogramStat",
    "MinMax",
    "MinMaxStat",
    "Moments",
    "MomentsStat",
    "NotCarried",
    "Observer",
    "Probe",
    "Rows",
    "RowsStat",
    "SecondMoment",
    "SecondMomentStat",
    "Stat",
    "follows",
]

F64 = NDArray[np.float64]


class Observer(Protocol):
    """What to learn about a tensor; hashable, so equal observers share one result."""

    def empty(self) -> Any:
        """The statistic of no data."""
        ...

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> Any:
        """The statistic of `array`, whose samples are numbered from `first_sample_index`.

        `samples` is how many samples the array holds, when that is not its first dimension (Swin's windows).
        """
        ...


@dataclass(frozen=True)
class Probe:
    """Ask for `observer`'s statistic of the value named `tensor` of the main graph."""

    tensor: str
    observer: Observer


@dataclass(frozen=True, eq=False)
class MinMaxStat(Stat):
    """Exact extremes `lo` <= `hi`, float64 of shape [] or [C]; +inf and -inf before any data."""

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
class MinMax:
    """Extremes of the tensor, or of each channel of `axis`."""

    axis: int | None = None

    def empty(self) -> MinMaxStat:
        return MinMaxStat(np.asarray(np.inf), np.asarray(-np.inf))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> MinMaxStat:
        if not array.size:
            return self.empty()
        axes = other_axes(array.ndim, self.axis)
        return MinMaxStat(np.asarray(array.min(axes), np.float64), np.asarray(array.max(axes), np.float64))


@dataclass(frozen=True, eq=False)
class AbsMaxStat(Stat):
    """Exact largest magnitude, float64 of shape [] or [C]; 0 before any data."""

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
class AbsMax:
    """Largest magnitude of the tensor, or of each channel of `axis`."""

    axis: int | None = None

    def empty(self) -> AbsMaxStat:
        return AbsMaxStat(np.asarray(0.0))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> AbsMaxStat:
        return absmax_of(MinMax(self.axis).observe(array)) if array.size else self.empty()


@dataclass(frozen=True, eq=False)
class MomentsStat(Stat):
    """`count` values a channel with their `sum` and `sumsq`, float64 of shape [] or [C]."""

    count: int
    sum: F64
    sumsq: F64

    @property
    def mean(self) -> F64:
        """Mean of each channel (NaN before any data)."""
        return self.sum / self.count if self.count else np.full_like(self.sum, np.nan)

    @property
    def var(self) -> F64:
        """Population variance of each channel (NaN before any data)."""
        return np.maximum(self.sumsq / self.count - self.mean**2, 0.0) if self.count else np.full_like(self.sum, np.nan)

    def merge(self, other: Self) -> Self:
        """Sums over both."""
        return replace(self, count=self.count + other.count, sum=self.sum + other.sum, sumsq=self.sumsq + other.sumsq)

    def mapped(self, t: ArrayLike, r: ArrayLike) -> Self:
        """Sums of x' = (x - t) / r; per-channel `t` and `r` need per-channel sums.

        Raises:
            NotCarried: per-channel map of a per-tensor statistic.
        """
        shift, ratio = np.asarray(t, np.float64), np.asarray(r, np.float64)
        if np.broadcast_shapes(shift.shape, ratio.shape, self.sum.shape) != self.sum.shape:
            raise NotCarried("a per-channel map cannot be followed by per-tensor moments")
        centred = self.sumsq - 2 * shift * self.sum + self.count * shift**2
        return replace(self, sum=(self.sum - self.count * shift) / ratio, sumsq=centred / ratio**2)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of the tensor, or of each channel of `axis`."""

    axis: int | None = None

    def empty(self) -> MomentsStat:
        return MomentsStat(0, np.asarray(0.0), np.asarray(0.0))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> MomentsStat:
        axes = other_axes(array.ndim, self.axis)
        wide = array.astype(np.float64)
        total = np.asarray(wide.sum(axes))
        return MomentsStat(array.size // max(1, total.size), total, np.asarray(np.square(wide, out=wide).sum(axes)))


@dataclass(frozen=True, eq=False)
class SecondMomentStat(Stat):
    """`xtx` = X^T X, float64 [C, C], over `count` rows of X [count, C]; shape [] before any data."""

    count: int
    xtx: F64

    def merge(self, other: Self) -> Self:
        """Sums over both."""
        return replace(self, count=self.count + other.count, xtx=self.xtx + other.xtx)


@dataclass(frozen=True)
class SecondMoment:
    """Uncentred second moment over the last axis (the Hessian of a linear layer is 2 X^T X; GPTQ, arXiv:2210.17323)."""

    def empty(self) -> SecondMomentStat:
        return SecondMomentStat(0, np.asarray(0.0))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> SecondMomentStat:
        rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
        return SecondMomentStat(len(rows), rows.T @ rows)


@dataclass(frozen=True, eq=False)
class RowsStat(Stat):
    """A sample of rows [k, C] in the order of their hash, with their `ids` [k, 2] = (sample, row in the sample)."""

    capacity: int
    keys: NDArray[np.uint64]
    ids: NDArray[np.int64]
    rows: NDArray[Any]

    def merge(self, other: Self) -> Self:
        """The rows with the smallest hashes of both (rows of unequal length: ValueError)."""
        return self.merge_all([other])

    def merge_all(self, others: Sequence[Self]) -> Self:
        """`merge` with each of `others`, copying the rows once."""
        parts = [p for p in (self, *others) if len(p.keys)]
        if len(parts) <= 1:
            return parts[0] if parts else self
        if len(lengths := {p.rows.shape[1] for p in parts}) > 1:
            raise ValueError(f"rows of {min(lengths)} and of {max(lengths)} values cannot be sampled together")
        keys, ids, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("keys", "ids", "rows"))
        order = np.lexsort((ids[:, 1], ids[:, 0], keys))[: self.capacity]
        return replace(self, keys=keys[order], ids=ids[order], rows=rows[order])

    @property
    def full(self) -> bool:
        """Whether only rows with a smaller hash than the last can still enter."""
        return len(self.keys) >= self.capacity

    def mapped(self, t: ArrayLike, r: ArrayLike) -> Self:
        """The same rows after x' = (x - t) / r, computed in float64."""
        rows = (self.rows.astype(np.float64) - np.asarray(t)) / np.asarray(r)
        return replace(self, rows=rows.astype(self.rows.dtype))


@dataclass(frozen=True)
class Rows:
    """At most `count` rows (vectors of the last axis), drawn by the smallest hash of (seed, sample, row): a
    uniform sample that does not depend on batches or their order (bottom-k sampling)."""

    count: int = 256
    seed: int = 0

    def empty(self) -> RowsStat:
        return RowsStat(self.count, np.zeros(0, np.uint64), np.zeros((0, 2), np.int64), np.zeros((0, 0), np.float32))

    def observe(
        self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None, bound: RowsStat | None = None
    ) -> RowsStat:
        """`bound` is a sample to merge with later: rows that could not enter it are left out at once."""
        rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        held = samples if samples is not None else (array.shape[0] if array.ndim > 1 else 1)
        # A tensor that does not grow with the batch belongs to its first sample.
        each = len(rows) // held if held and len(rows) % held == 0 else max(1, len(rows))
        ids, keys = _ranked(first_sample_index, len(rows), each, self.seed)
        if bound is not None and bound.full:
            chosen = keys <= bound.keys[-1]
            ids, keys, rows = ids[chosen], keys[chosen], rows[chosen]
        order = np.lexsort((ids[:, 1], ids[:, 0], keys))[: self.count]
        return RowsStat(self.count, keys[order], ids[order], rows[order])


def follows(observer: Observer) -> bool:
    """Whether this observer's statistic can be carried through a per-channel x' = (x - t) / r."""
    return isinstance(observer, Rows) or (isinstance(observer, MinMax | Moments) and observer.axis is not None)


def other_axes(ndim: int, axis: int | None) -> tuple[int, ...]:
    """The axes that a per-`axis` reduction removes (all of them when `axis` is None)."""
    if axis is None:
        return tuple(range(ndim))
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of rank {ndim}")
    return tuple(i for i in range(ndim) if i != axis % ndim)


def absmax_of(stat: MinMaxStat) -> AbsMaxStat:
    """The largest magnitude that extremes imply."""
    return AbsMaxStat(np.maximum(np.maximum(-stat.lo, stat.hi), 0.0))


@lru_cache(maxsize=16)
def _ranked(first: int, count: int, each: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Ids and hashes of a batch's rows: equal for all its tensors with as many rows."""
    index = np.arange(count)
    ids = np.stack([first + index // each, index % each], axis=1).astype(np.int64)
    return ids, _hash(ids, seed)


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 of (seed, sample, row) (Steele et al. 2014)."""
    sample, row = ids[:, 0].astype(np.uint64), ids[:, 1].astype(np.uint64)
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64)
    return _mix(_mix(sample + start) + row)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
