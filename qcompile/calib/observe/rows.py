"""Single rows (vectors of the last axis) by name: a uniform sample of them, and those with the largest magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.calib.observe.observer import Observer, Reduction, Seen, Tally
from qcompile.calib.observe.stat import Stat, width

_WAITING = 128


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
class Rows(Observer[RowsStat]):
    """At most `count` rows (vectors of the last axis), drawn by the smallest hash of (seed, sample, row): a
    uniform sample that does not depend on batches or their order (bottom-k sampling)."""

    kind: ClassVar[str] = "rows"
    count: int = 256
    seed: int = 0

    def empty(self) -> RowsStat:
        return RowsStat(self.count, np.zeros(0, np.uint64), np.zeros((0, 2), np.int64), np.zeros((0, 0), np.float32))

    def observe(
        self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None, bound: RowsStat | None = None
    ) -> RowsStat:
        """`bound` is a sample to merge with later: rows that could not enter it are left out at once."""
        rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        ids, keys = _ranked(first_sample_index, len(rows), rows_each(array, len(rows), samples), self.seed)
        if bound is not None and bound.full:
            chosen = keys <= bound.keys[-1]
            ids, keys, rows = ids[chosen], keys[chosen], rows[chosen]
        order = np.lexsort((ids[:, 1], ids[:, 0], keys))[: self.count]
        return RowsStat(self.count, keys[order], ids[order], rows[order])

    @property
    def follows(self) -> bool:
        return True

    def tally(self, known: RowsStat) -> Tally[RowsStat]:
        return _Waiting(known, self)

    def nbytes(self, shape: Sequence[int]) -> int:
        return self.count * (4 * width(shape) + 24)


@dataclass
class _Waiting(Tally[RowsStat]):
    """The few rows that a batch adds to a sample wait for more, since a merge copies the sample."""

    observer: Rows
    waiting: list[RowsStat] = field(default_factory=list[RowsStat])

    def add(self, seen: Seen) -> None:
        self.waiting.append(self.observer.observe(seen.arrays[0], seen.first, seen.samples, self.known))
        if sum(len(part.keys) for part in self.waiting) >= _WAITING:
            self.told()

    def told(self) -> RowsStat:
        self.known, self.waiting = self.known.merge_all(self.waiting), []
        return self.known


@dataclass(frozen=True, eq=False)
class ExtremesStat(Stat):
    """The rows with the largest magnitudes: `magnitudes` [k] float64, falling, and `ids` [k, 2] = (sample, row in it)."""

    capacity: int
    magnitudes: NDArray[np.float64]
    ids: NDArray[np.int64]

    def merge(self, other: Self) -> Self:
        """The largest of both; equal magnitudes in the order of their ids."""
        magnitudes, ids = np.concatenate([self.magnitudes, other.magnitudes]), np.concatenate([self.ids, other.ids])
        order = np.lexsort((ids[:, 1], ids[:, 0], -magnitudes))[: self.capacity]
        return replace(self, magnitudes=magnitudes[order], ids=ids[order])


@dataclass(frozen=True)
class Extremes(Observer[ExtremesStat]):
    """The `count` rows with the largest magnitudes, and which samples they come from: who sets a tensor's range."""

    kind: ClassVar[str] = "extremes"
    count: int = 8

    def empty(self) -> ExtremesStat:
        return ExtremesStat(self.count, np.zeros(0), np.zeros((0, 2), np.int64))

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> ExtremesStat:
        if not array.size:
            return self.empty()
        rows = array if array.ndim else array.reshape(1)
        return self.of_extremes(rows.min(-1), rows.max(-1), first_sample_index, samples)

    def in_graph(self, rank: int) -> Reduction | None:
        return Reduction(("ReduceMin", "ReduceMax"), (rank - 1,)) if rank > 1 else None

    def from_batch(self, seen: Seen) -> ExtremesStat:
        if not seen.reduced:
            return self.observe(seen.arrays[0], seen.first, seen.samples)
        low, high = seen.arrays
        return self.of_extremes(low, high, seen.first, seen.samples)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 24 * self.count

    def of_extremes(
        self, lo: NDArray[Any], hi: NDArray[Any], first_sample_index: int = 0, samples: int | None = None
    ) -> ExtremesStat:
        """The statistic from each row's extremes: arrays of the tensor's shape without its last axis."""
        low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
        size = np.maximum(-low, high).reshape(-1)
        held = samples if low.ndim or samples is None else 1
        each = rows_each(low if low.ndim else low.reshape(1), len(size), held, rows_only=True)
        # The threshold keeps every tie, which the order by id then decides.
        largest = (
            np.flatnonzero(size >= np.partition(size, -self.count)[-self.count])
            if len(size) > self.count
            else np.arange(len(size))
        )
        ids = np.stack([first_sample_index + largest // each, largest % each], axis=1).astype(np.int64)
        return self.empty().merge(ExtremesStat(self.count, size[largest], ids))


def rows_each(array: NDArray[Any], rows: int, samples: int | None, *, rows_only: bool = False) -> int:
    """How many of the array's rows belong to one sample; `rows_only` tells that its last axis is already gone."""
    held = samples if samples is not None else (array.shape[0] if array.ndim > (0 if rows_only else 1) else 1)
    # A tensor that does not grow with the batch belongs to its first sample.
    return rows // held if held and rows % held == 0 else max(1, rows)


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
