"""Float sums that do not depend on how the data is split: one partial sum for each chunk of `CHUNK` samples.

Floating-point addition is not associative, so a sum over shards would depend on the shards.  Here the partial sums are
kept by chunk and added in the order of their index; a run from sample 0 folds finished chunks into a prefix, so that
one process holds the prefix and the current chunk only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

CHUNK = 64

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChunkedSum:
    """`prefix` = the sum of chunks 0 .. `folded` - 1; `parts` = {chunk index: sum}, all of one shape ([] before any data).

    The total is prefix + parts in ascending order of chunk: the same bits for every partition into whole chunks.
    """

    prefix: F64 = field(default_factory=lambda: np.asarray(0.0))
    folded: int = 0
    parts: dict[int, F64] = field(default_factory=dict[int, F64])

    @property
    def total(self) -> F64:
        """The sum of everything."""
        total = self.prefix
        for chunk in sorted(self.parts):
            total = total + self.parts[chunk]
        return total

    def merge(self, other: Self) -> Self:
        """Both; a chunk that both hold in part is added up.

        Raises:
            ValueError: one side has folded chunks that the other holds too: the shards overlap.
        """
        base, added = (self, other) if self.folded >= other.folded else (other, self)
        if added.folded or any(chunk < base.folded for chunk in added.parts):
            raise ValueError(f"both statistics hold the first {base.folded * CHUNK} samples; merge shards that do not overlap")
        # In the order of the arguments: batches of one chunk are added one after the other.
        parts = dict(self.parts)
        for chunk, value in other.parts.items():
            parts[chunk] = parts[chunk] + value if chunk in parts else value
        return type(self)(base.prefix, base.folded, parts)

    def fold(self, finished: int) -> Self:
        """Chunks below `finished` are complete: move them into the prefix where no chunk before them is missing."""
        prefix, folded, parts = self.prefix, self.folded, dict(self.parts)
        while folded < finished and folded in parts:
            prefix, folded = prefix + parts.pop(folded), folded + 1
        return type(self)(prefix, folded, parts)

    def to_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Four arrays under `name`."""
        chunks = sorted(self.parts)
        parts = np.stack([self.parts[c] for c in chunks]) if chunks else np.zeros((0,))
        arrays = {"prefix": self.prefix, "folded": np.asarray(self.folded), "chunks": np.array(chunks, np.int64), "parts": parts}
        return {f"{name}_{key}": array for key, array in arrays.items()}

    @classmethod
    def from_arrays(cls, name: str, arrays: dict[str, NDArray[Any]]) -> Self:
        """What `to_arrays(name)` wrote."""
        parts = dict(zip(arrays[f"{name}_chunks"].tolist(), arrays[f"{name}_parts"], strict=True))
        return cls(arrays[f"{name}_prefix"], int(arrays[f"{name}_folded"]), parts)


def chunk_samples(fixed_batch: int | None) -> int:
    """Samples of one chunk: `CHUNK`, or for a model with a fixed batch the last multiple of it up to there (itself above)."""
    return CHUNK if fixed_batch is None else fixed_batch * max(1, CHUNK // fixed_batch)


def segments(start: int, end: int, length: int | None) -> Iterator[tuple[int, int]]:
    """`start` to `end`, cut at the multiples of `length`: a batch never ends elsewhere because of a segment."""
    cuts = [] if length is None else range((start // length + 1) * length, end, length)
    return (r for r in itertools.pairwise([start, *cuts, end]) if r[0] < r[1])


def by_chunk(array: NDArray[Any], first: int, samples: int | None) -> Iterator[tuple[int, slice]]:
    """(chunk, rows of the first axis) of an array that holds `samples` samples from number `first` on.

    An array that does not grow with its samples belongs to the chunk of its first one.
    """
    length = array.shape[0] if array.ndim else 1
    held = samples if samples is not None else length
    if not held or length % held:
        yield first // CHUNK, slice(0, length)
        return
    each, start = length // held, first
    while start < first + held:
        stop = min((start // CHUNK + 1) * CHUNK, first + held)
        yield start // CHUNK, slice((start - first) * each, (stop - first) * each)
        start = stop
