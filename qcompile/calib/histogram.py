"""A histogram whose merge is exact: bins are aligned to multiples of a power of two.

The bin width is a function of the exact extremes alone (the smallest power of two that covers them with `bins` bins),
and coarsening a bin index is an exact floor-halving; so the state is a function of the multiset of values, whatever
the batches, their order and the machines were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.stat import Stat

F64 = NDArray[np.float64]

_INDEX_BITS = 24  # bin indices stay exact in float32
_ZERO_EXPONENT = -140
_CHUNK = 1 << 17


@dataclass(frozen=True, eq=False)
class HistogramStat(Stat):
    """`counts[i]` values lie in [(start + i) * 2^exponent, (start + i + 1) * 2^exponent).

    `lo`, `hi` (float64, shape []) are the exact extremes; `bins` bounds len(counts).
    """

    bins: int
    exponent: int
    start: int
    counts: NDArray[np.int64]
    lo: F64
    hi: F64

    @property
    def edges(self) -> F64:
        """The len(counts) + 1 bin edges."""
        return np.ldexp(np.arange(self.start, self.start + len(self.counts) + 1, dtype=np.float64), self.exponent)

    @property
    def total(self) -> int:
        """How many values were observed."""
        return int(self.counts.sum())

    def merge(self, other: Self) -> Self:
        """Both, at the coarser of the widths that their joint range needs; exact."""
        if not len(self.counts):
            return other
        if not len(other.counts):
            return self
        lo, hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        exponent = _exponent(float(lo), float(hi), self.bins)
        start, length = _span(float(lo), float(hi), exponent)
        counts = np.zeros(length, np.int64)
        for part in (self, other):
            if part.exponent == exponent:
                counts[part.start - start : part.start - start + len(part.counts)] += part.counts
                continue
            index = (np.arange(part.start, part.start + len(part.counts)) >> (exponent - part.exponent)) - start
            np.add.at(counts, index, part.counts)
        return replace(self, exponent=exponent, start=start, counts=counts, lo=lo, hi=hi)


@dataclass(frozen=True)
class Histogram:
    """Counts over at most `bins` (>= 2) bins of a power-of-two width; at least about bins / 2 cover the range."""

    bins: int = 2048

    def empty(self) -> HistogramStat:
        return HistogramStat(self.bins, _ZERO_EXPONENT, 0, np.zeros(0, np.int64), np.asarray(np.inf), np.asarray(-np.inf))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> HistogramStat:
        if not array.size:
            return self.empty()
        lo, hi = float(array.min()), float(array.max())
        exponent = _exponent(lo, hi, self.bins)
        start, length = _span(lo, hi, exponent)
        counts = np.zeros(length, np.int64)
        flat = array.reshape(-1)
        for i in range(0, flat.size, _CHUNK):
            counts += np.bincount(_indices(flat[i : i + _CHUNK], exponent, start), minlength=length)
        return HistogramStat(self.bins, exponent, start, counts, np.asarray(lo), np.asarray(hi))


def _exponent(lo: float, hi: float, bins: int) -> int:
    """The smallest e so that bins of width 2^e cover [lo, hi] with at most `bins` of them.

    Grows with the range (so that merging never needs to refine) and keeps |index| below 2^24.
    """
    top = max(abs(lo), abs(hi))
    if top == 0:
        return _ZERO_EXPONENT
    exponent = max(int(np.frexp(top)[1]) - _INDEX_BITS, _ZERO_EXPONENT)
    if hi > lo:
        exponent = max(exponent, int(np.frexp((hi - lo) / bins)[1]) - 1)
    while _span(lo, hi, exponent)[1] > bins:
        exponent += 1
    return exponent


def _span(lo: float, hi: float, exponent: int) -> tuple[int, int]:
    """Index of the first bin and number of bins that cover [lo, hi]."""
    first, last = (int(np.floor(np.ldexp(end, -exponent))) for end in (lo, hi))
    return first, last - first + 1


def _indices(x: NDArray[Any], exponent: int, start: int) -> NDArray[np.int32]:
    """Bin of each value, counted from `start`; scaling by a power of two is exact (in float32 only upwards: subnormals
    would vanish), and so is the subtraction of integers below 2^24."""
    exact = x.dtype == np.float32 and -120 < exponent <= 0
    scaled = x * np.float32(2.0**-exponent) if exact else np.ldexp(x.astype(np.float64), -exponent)
    np.floor(scaled, out=scaled)
    scaled -= start
    return scaled.astype(np.int32)
