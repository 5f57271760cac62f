"""Moments and second moments: float64 sums, the same bits for every partition into whole chunks of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import get_blas_funcs

from qcompile.calib.observe.chunks import CHUNK, ChunkedSum, by_chunk
from qcompile.calib.observe.observer import Observer, Reduction, Seen, Tally
from qcompile.calib.observe.stat import NotCarried, Stat, by_head, other_axes, width

F64 = NDArray[np.float64]
_COUNT, _SUM, _SQUARES = range(3)
_SSYRK: Any = get_blas_funcs("syrk", dtype=np.float32)


@dataclass(frozen=True, eq=False)
class MomentsStat(Stat):
    """`count` values a channel with their `sum` and `sumsq`, float64 of shape [], [C] or [heads].

    `sums` holds [3, ...]: count, sum and sum of squares of each chunk.
    """

    sums: ChunkedSum

    @property
    def count(self) -> int:
        """Values a channel."""
        total = self.sums.total
        return int(total[_COUNT].flat[0]) if total.ndim else 0

    @property
    def sum(self) -> F64:
        """Sum of each channel."""
        total = self.sums.total
        return total[_SUM] if total.ndim else total

    @property
    def sumsq(self) -> F64:
        """Sum of squares of each channel."""
        total = self.sums.total
        return total[_SQUARES] if total.ndim else total

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
        return replace(self, sums=self.sums.merge(other.sums))

    def mapped(self, t: ArrayLike, r: ArrayLike) -> Self:
        """Sums of x' = (x - t) / r; per-channel `t` and `r` need per-channel sums.

        Raises:
            NotCarried: per-channel map of a per-tensor statistic.
        """
        shift, ratio = np.asarray(t, np.float64), np.asarray(r, np.float64)
        total = self.sums.total
        if np.broadcast_shapes(shift.shape, ratio.shape, total.shape[1:]) != total.shape[1:]:
            raise NotCarried("a per-channel map cannot be followed by per-tensor moments")
        if not total.ndim:
            return self
        count, first, squares = total
        centred = squares - 2 * shift * first + count * shift**2
        mapped = np.stack([count, (first - count * shift) / ratio, centred / ratio**2])
        return replace(self, sums=ChunkedSum(mapped, max([self.sums.folded - 1, *self.sums.parts], default=-1) + 1))

    def folded(self, finished: int) -> Self:
        return replace(self, sums=self.sums.fold(finished))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        return self.sums.to_arrays("sums")

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Self:
        return cls(ChunkedSum.from_arrays("sums", arrays))


@dataclass(frozen=True)
class Moments(Observer[MomentsStat]):
    """Count, sum and sum of squares of the tensor, of each channel of `axis`, or of each of `heads` groups of them."""

    kind: ClassVar[str] = "moments"
    axis: int | None = None
    heads: int | None = None

    def empty(self) -> MomentsStat:
        return MomentsStat(ChunkedSum())

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> MomentsStat:
        stat = self.empty()
        for chunk, rows in by_chunk(array, first_sample_index, samples):
            part = array[rows] if array.ndim else array
            axes = other_axes(array.ndim, self.axis)
            wide = part.astype(np.float64)
            total = wide.sum(axes)
            stat = stat.merge(self.of_sums(part.size, total, np.square(wide, out=wide).sum(axes), chunk * CHUNK))
        return stat

    @property
    def follows(self) -> bool:
        return self.axis is not None and self.heads is None

    def in_graph(self, rank: int) -> Reduction | None:
        return Reduction(("ReduceSum", "ReduceSumSquare", "Size"), other_axes(rank, self.axis), sums=True)

    def from_batch(self, seen: Seen) -> MomentsStat:
        if not seen.reduced:
            return self.observe(seen.arrays[0], seen.chunk_first, 1)
        total, squares, size = seen.arrays
        return self.of_sums(int(size), total, squares, seen.chunk_first)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 64 * width(shape, self.axis)

    def of_sums(self, size: int, total: ArrayLike, squares: ArrayLike, first_sample_index: int) -> MomentsStat:
        """The statistic of `size` values in all from the sums of the tensor or of each channel."""
        first, second = np.asarray(total, np.float64), np.asarray(squares, np.float64)
        if self.heads is not None:
            first, second = by_head(first, self.heads).sum(-1), by_head(second, self.heads).sum(-1)
        count = np.full_like(first, size // max(1, first.size))
        return MomentsStat(ChunkedSum(parts={first_sample_index // CHUNK: np.stack([count, first, second])}))


@dataclass(frozen=True, eq=False)
class SecondMomentStat(Stat):
    """`xtx` = X^T diag(w) X, float64 [C, C], over `count` rows of X with w != 0; shape [] before any data.

    `sums` holds the upper triangle of each chunk's product: the other half is its mirror image.
    """

    count: int
    sums: ChunkedSum

    @property
    def xtx(self) -> F64:
        """The sum over all rows."""
        upper = self.sums.total
        return upper + np.triu(upper, 1).T if upper.ndim else upper

    def merge(self, other: Self) -> Self:
        """Sums over both."""
        return replace(self, count=self.count + other.count, sums=self.sums.merge(other.sums))

    def folded(self, finished: int) -> Self:
        return replace(self, sums=self.sums.fold(finished))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        return {"count": np.asarray(self.count), **self.sums.to_arrays("xtx")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Self:
        return cls(int(arrays["count"]), ChunkedSum.from_arrays("xtx", arrays))


@dataclass(frozen=True)
class SecondMoment(Observer[SecondMomentStat]):
    """Uncentred second moment over the last axis (the Hessian of a linear layer is 2 X^T X; GPTQ, arXiv:2210.17323).

    `weights` names another tensor of the graph, one number for each row of this one (e.g. attention_mask [N, T] for
    [N, T, C]): a token mask, or how much each token counts.
    """

    kind: ClassVar[str] = "second-moment"
    weights: str | None = None

    def empty(self) -> SecondMomentStat:
        return SecondMomentStat(0, ChunkedSum())

    def observe(
        self,
        array: NDArray[Any],
        first_sample_index: int = 0,
        samples: int | None = None,
        weights: NDArray[Any] | None = None,
    ) -> SecondMomentStat:
        """`weights` holds as many numbers as the array has rows.

        Raises:
            ValueError: it does not.
        """
        stat = self.empty()
        for chunk, part in by_chunk(array, first_sample_index, samples):
            rows = array[part].reshape(-1, array.shape[-1]).astype(np.float64)
            used = None if weights is None else _row_weights(weights, array, part)
            left = rows.T if used is None else rows.T * used
            count = len(rows) if used is None else int(np.count_nonzero(used))
            stat = stat.merge(SecondMomentStat(count, ChunkedSum(parts={chunk: np.triu(left @ rows)})))
        return stat

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.weights is None else (self.weights,)

    def tally(self, known: SecondMomentStat) -> Tally[SecondMomentStat]:
        return _Updated(known, self)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 12 * width(shape) ** 2  # float64, and the chunk at hand in float32

    def added(
        self, known: SecondMomentStat, array: NDArray[Any], chunk: int, weights: NDArray[Any] | None = None, reuse: bool = False
    ) -> SecondMomentStat:
        """`known` and the rows of `array`, all of one chunk: `observe` in float32 and, with `reuse`, in known's own memory.

        A chunk's products are added up in float32 by BLAS (syrk: half the multiplications, no product to store and add);
        a chunk that was read from a file goes on from the same bits.

        Raises:
            ValueError: not one weight for each row.
        """
        rows = array.reshape(-1, array.shape[-1])
        count = len(rows)
        if weights is not None:
            used = _row_weights(weights, array, slice(None))
            count = int(np.count_nonzero(used))
            rows = rows * np.sqrt(used)[:, None]
        parts: dict[int, NDArray[Any]] = dict(known.sums.parts)
        parts[chunk] = _syrk(np.ascontiguousarray(rows, np.float32), parts.get(chunk), reuse)
        return SecondMomentStat(known.count + count, replace(known.sums, parts=parts))


@dataclass
class _Updated(Tally[SecondMomentStat]):
    """Adds to the sums in place, as long as nobody else holds them."""

    observer: SecondMoment
    own: bool = False

    def add(self, seen: Seen) -> None:
        array, *weights = seen.arrays
        self.known = self.observer.added(self.known, array, seen.chunk, *weights, reuse=self.own).folded(seen.chunk)
        self.own = True

    def told(self) -> SecondMomentStat:
        self.own = False
        return self.known


def _syrk(rows: NDArray[np.float32], into: NDArray[Any] | None, reuse: bool) -> NDArray[np.float32]:
    """`into` + rows^T rows, the upper triangle, column by column in memory as BLAS wants it."""
    if into is None:
        into, reuse = np.zeros((rows.shape[1], rows.shape[1]), np.float32, order="F"), True
    return _SSYRK(1.0, rows.T, beta=1.0, c=np.asfortranarray(into, np.float32), overwrite_c=reuse)


def _row_weights(weights: NDArray[Any], array: NDArray[Any], part: slice) -> F64:
    rows = array.size // array.shape[-1]
    if weights.size != rows:
        raise ValueError(f"{weights.size} weights do not fit {rows} rows")
    return weights.reshape(array.shape[:-1])[part].reshape(-1).astype(np.float64)
