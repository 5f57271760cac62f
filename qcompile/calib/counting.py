"""How often each small integer occurs: the inner loop of histograms."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 17
_NOTHING = np.zeros(1, np.int32)

I32, I64 = NDArray[np.int32], NDArray[np.int64]


def count_codes(codes: I32, first: int, bins: int) -> I64:
    """How many of `codes` (int32, any shape, contiguous) equal first, first + 1, ..., first + bins - 1.

    Raises:
        ValueError: a code lies outside.
    """
    flat = codes.reshape(-1)
    counts = np.zeros(bins, np.int64)
    for i in range(0, flat.size, _BLOCK):
        block = flat[i : i + _BLOCK]
        index = block - np.int32(first) if first else block
        # The kernel does not look: an index outside would write into foreign memory.  Unsigned, one maximum tests both ends.
        if int(index.view(np.uint32).max()) >= bins:
            raise ValueError(f"codes outside [{first}, {first + bins})")
        counts += _count(index, bins)
    return counts


def count_by_numpy(index: I32, bins: int) -> I64:
    """The reference: converts to int64 first, 2 to 3 times slower."""
    return np.bincount(index, minlength=bins)


def _count_by_scipy(index: I32, bins: int) -> I32:
    """SciPy's kernel of A[:, columns] for a matrix without rows: all that is left is to count int32 columns."""
    counts = np.zeros(bins, np.int32)
    _KERNEL(index.size, index, 0, bins, _NOTHING, _NOTHING, counts, _NOTHING)
    return np.diff(counts, prepend=np.int32(0))  # it ends with the running sum


def _kernel() -> Callable[..., None] | None:
    """SciPy's kernel, where this version has it and it counts (it is not part of the public interface)."""
    try:
        found: Any = import_module("scipy.sparse._sparsetools").csr_column_index1
        counts = np.zeros(3, np.int32)
        found(4, np.array([0, 2, 2, 1], np.int32), 0, 3, _NOTHING, _NOTHING, counts, np.zeros(1, np.int32))
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return found if counts.tolist() == [1, 2, 4] else None


_KERNEL: Any = _kernel()
_count: Callable[[I32, int], NDArray[Any]] = count_by_numpy if _KERNEL is None else _count_by_scipy
