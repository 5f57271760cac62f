"""How a tensor's values changed, and which statistics follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe.extrema import MinMax
from qcompile.calib.observe.rows import Rows

FOLD_ROWS = 512
FOLDABLE = (MinMax(-1), Rows(FOLD_ROWS))
"""What a fold asks of its tensor: both follow the fold, so that `annotate` finds the range without another sweep."""


@dataclass(frozen=True)
class AffineMap:
    """How a tensor's values changed: x' = (x - t) / r per channel; r, t float64 of shape [C] or []."""

    r: NDArray[np.float64]
    t: NDArray[np.float64]
