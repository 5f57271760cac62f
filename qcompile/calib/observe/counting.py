"""How often each small integer occurs: the inner loop of histograms."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NOTHING = np.zeros(1, np.int32)

I32 = NDArray[np.int32]


def count_by_scipy(counts: I32, index: I32) -> None:
    """SciPy's kernel of A[:, columns] for a matrix without rows and columns: all that is left is to count int32 columns."""
    _KERNEL(index.size, index, 0, 0, _NOTHING, _NOTHING, counts, _NOTHING)


def count_by_numpy(counts: I32, index: I32) -> None:
    """The reference: converts to int64 first, 2 to 3 times slower."""
    counts += np.bincount(index, minlength=len(counts)).astype(np.int32)


def _kernel() -> Callable[..., None] | None:
    """SciPy's kernel, where this version has it and it counts (it is not part of the public interface)."""
    try:
        found: Any = import_module("scipy.sparse._sparsetools").csr_column_index1
        counts = np.array([1, 0, 0], np.int32)
        found(4, np.array([0, 2, 2, 1], np.int32), 0, 0, _NOTHING, _NOTHING, counts, np.zeros(1, np.int32))
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return found if counts.tolist() == [2, 1, 2] else None


_KERNEL: Any = _kernel()
count_into: Callable[[I32, I32], None] = count_by_numpy if _KERNEL is None else count_by_scipy
"""Add to counts[i] how many of `index` (int32 [n], contiguous) equal i; all of them must be in [0, len(counts)).

SciPy's kernel does not look: an index outside would write into foreign memory.  Histograms know the extremes first.
"""
