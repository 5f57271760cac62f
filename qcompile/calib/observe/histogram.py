"""A histogram whose merge is exact: bins are aligned to multiples of a power of two.

The bin width is a function of the exact extremes alone (the smallest power of two that covers them with `bins` bins),
and coarsening a bin index is an exact floor-halving; so the state is a function of the multiset of values, whatever
the batches, their order and the machines were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from qcompile.calib.observe.observer import Observer, Seen, Tally
from qcompile.calib.observe.stat import Stat, by_head, width

F64 = NDArray[np.float64]
Scratch = tuple[NDArray[np.float32], NDArray[np.int32]]

_INDEX_BITS = 24  # bin indices stay exact in float32
_ZERO_EXPONENT = -140
_BLOCK = 1 << 16  # three arrays of it fit a core's second-level cache
_ONES = np.ones(2 * _BLOCK, np.int32)  # array_split makes blocks of up to 1.5


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

    def coarsened(self, exponent: int) -> Self:
        """The same values in bins of width 2^exponent, which is not below this one's; exact."""
        shift = exponent - self.exponent
        if shift == 0 or not len(self.counts):
            return self
        index = np.arange(self.start, self.start + len(self.counts)) >> shift
        counts = np.zeros(int(index[-1] - index[0]) + 1, np.int64)
        np.add.at(counts, index - index[0], self.counts)
        return replace(self, exponent=exponent, start=int(index[0]), counts=counts)

    def merge(self, other: Self) -> Self:
        """Both, at the coarser of the widths that their joint range needs; exact."""
        if not len(self.counts):
            return other
        if not len(other.counts):
            return self
        lo, hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        exponent = bin_exponent(float(lo), float(hi), self.bins)
        start, length = bin_span(float(lo), float(hi), exponent)
        counts = np.zeros(length, np.int64)
        for part in (self.coarsened(exponent), other.coarsened(exponent)):
            counts[part.start - start : part.start - start + len(part.counts)] += part.counts
        return replace(self, exponent=exponent, start=start, counts=counts, lo=lo, hi=hi)


@dataclass(frozen=True)
class Histogram(Observer[HistogramStat]):
    """Counts over at most `bins` (>= 2) bins of a power-of-two width; at least about bins / 2 cover the range."""

    kind: ClassVar[str] = "histogram"
    infinities: ClassVar = "refused"
    bins: int = 4096

    def empty(self) -> HistogramStat:
        return HistogramStat(self.bins, _ZERO_EXPONENT, 0, np.zeros(0, np.int64), np.asarray(np.inf), np.asarray(-np.inf))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> HistogramStat:
        return self.added(self.empty(), array)

    def tally(self, known: HistogramStat) -> Tally[HistogramStat]:
        return _Counted(known, self)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * self.bins

    def added(self, known: HistogramStat, array: NDArray[Any]) -> HistogramStat:
        """`known` and the values of `array`, in the bins of known as long as they hold them: one look at each value.

        Raises:
            ValueError: NaN or infinite values.
        """
        if not array.size:
            return known
        flat = np.ascontiguousarray(array).reshape(-1)
        stat = replace(known, counts=known.counts.copy()) if len(known.counts) else self._blank(flat.min(), flat.max())
        blocks = np.array_split(flat, max(1, round(flat.size / _BLOCK)))
        scratch = np.empty(len(blocks[0]), np.float32), np.empty(len(blocks[0]), np.int32)
        for block in blocks:
            stat = self._with_block(stat, block, scratch)
        return stat

    def _blank(self, lo: ArrayLike, hi: ArrayLike) -> HistogramStat:
        """The bins for a range, all of them empty."""
        ends = float(np.asarray(lo)), float(np.asarray(hi))
        if not np.isfinite(ends).all():
            raise ValueError("a histogram counts finite values only")
        exponent = bin_exponent(*ends, self.bins)
        start, length = bin_span(*ends, exponent)
        low, high = (np.asarray(end, np.float64) for end in ends)
        return HistogramStat(self.bins, exponent, start, np.zeros(length, np.int64), low, high)

    def _with_block(self, stat: HistogramStat, block: NDArray[Any], scratch: Scratch) -> HistogramStat:
        """All passes over one block while the processor's cache holds it; the counts change in place."""
        lo, hi = float(block.min()), float(block.max())
        if not (stat.lo <= lo and hi <= stat.hi):
            stat = stat.merge(self._blank(lo, hi))
        codes = _codes(block, stat.exponent, stat.start, lo < 0, scratch)
        np.add(stat.counts, occurrences(codes, len(stat.counts)), out=stat.counts)
        return stat


@dataclass
class _Counted(Tally[HistogramStat]):
    """In the bins of what is known, as long as they hold a batch."""

    observer: Histogram

    def add(self, seen: Seen) -> None:
        self.known = self.observer.added(self.known, seen.arrays[0])


@dataclass(frozen=True, eq=False)
class ChannelHistogramsStat(Stat):
    """One histogram for each channel (or head); none before any data."""

    channels: tuple[HistogramStat, ...]

    @property
    def lo(self) -> F64:
        """Smallest value of each channel, [C]."""
        return np.array([float(c.lo) for c in self.channels])

    @property
    def hi(self) -> F64:
        """Largest value of each channel, [C]."""
        return np.array([float(c.hi) for c in self.channels])

    def merge(self, other: Self) -> Self:
        """Channel by channel."""
        if not self.channels or not other.channels:
            return self if self.channels else other
        return replace(self, channels=tuple(a.merge(b) for a, b in zip(self.channels, other.channels, strict=True)))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        lengths = np.array([len(c.counts) for c in self.channels], np.int64)
        numbers = np.array([(c.bins, c.exponent, c.start) for c in self.channels], np.int64).reshape(-1, 3)
        counts = np.concatenate([c.counts for c in self.channels]) if self.channels else np.zeros(0, np.int64)
        return {"lengths": lengths, "numbers": numbers, "counts": counts, "lo": self.lo, "hi": self.hi}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Self:
        counts = np.split(arrays["counts"], np.cumsum(arrays["lengths"])[:-1]) if len(arrays["lengths"]) else []
        rows = zip(arrays["numbers"].tolist(), counts, arrays["lo"], arrays["hi"], strict=True)
        return cls(tuple(HistogramStat(b, e, s, part, np.asarray(lo), np.asarray(hi)) for (b, e, s), part, lo, hi in rows))


@dataclass(frozen=True)
class ChannelHistograms(Observer[ChannelHistogramsStat]):
    """A histogram of each channel of `axis`, or of each of `heads` equal groups of its channels."""

    kind: ClassVar[str] = "channel-histograms"
    axis: int = -1
    bins: int = 4096
    heads: int | None = None

    def empty(self) -> ChannelHistogramsStat:
        return ChannelHistogramsStat(())

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> ChannelHistogramsStat:
        if not array.size:
            return self.empty()
        channels = by_head(np.moveaxis(array, self.axis, -1), self.heads)
        one = Histogram(self.bins)
        groups = range(channels.shape[-2])
        return ChannelHistogramsStat(tuple(one.observe(np.ascontiguousarray(channels[..., c, :])) for c in groups))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * self.bins * (self.heads or width(shape, self.axis))


def bin_exponent(lo: float, hi: float, bins: int) -> int:
    """The smallest e so that bins of width 2^e cover [lo, hi] with at most `bins` of them.

    Grows with the range (so that merging never needs to refine) and keeps |index| below 2^24.
    """
    top = max(abs(lo), abs(hi))
    if top == 0:
        return _ZERO_EXPONENT
    exponent = max(int(np.frexp(top)[1]) - _INDEX_BITS, _ZERO_EXPONENT)
    if hi > lo:
        exponent = max(exponent, int(np.frexp((hi - lo) / bins)[1]) - 1)
    while bin_span(lo, hi, exponent)[1] > bins:
        exponent += 1
    return exponent


def bin_span(lo: float, hi: float, exponent: int) -> tuple[int, int]:
    """Index of the first bin and number of bins that cover [lo, hi]."""
    first, last = (int(np.floor(np.ldexp(end, -exponent))) for end in (lo, hi))
    return first, last - first + 1


def occurrences(codes: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """How many of `codes` (at most 2^17 of them, each in [0, `length`): this is not looked at) equal 0, 1, .. `length` - 1.

    The row of a sparse matrix, whose entries of one column are added up: `numpy.bincount` converts to int64 first and takes
    three times as long.
    """
    row = csr_array((_ONES[: codes.size], codes, np.array([0, codes.size], np.int32)), shape=(1, length))
    return row.toarray()[0]


def _codes(x: NDArray[Any], exponent: int, start: int, signed: bool, scratch: Scratch) -> NDArray[np.int32]:
    """floor(x / 2^exponent) - start of each value; scaling by a power of two is exact (in float32 only upwards: subnormals
    would vanish)."""
    scaled, index = scratch[0][: x.size], scratch[1][: x.size]
    if x.dtype.char in "ef" and -120 < exponent <= 0:  # float16 and float32
        np.multiply(x, np.float32(2.0**-exponent), out=scaled)
    else:
        scaled = np.ldexp(x.astype(np.float64), -exponent)
    if signed:  # the conversion truncates towards zero: the same for what is not negative
        np.floor(scaled, out=scaled)
    np.copyto(index, scaled, casting="unsafe")
    return np.subtract(index, np.int32(start), out=index) if start else index
