"""How a tensor's values changed, and which statistics follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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


@dataclass
class Changes:
    """Which tensors' values a pass moved, by name.

    `maps`: by an affine map, which statistics may follow.  `moved`: in another way.  `derived`: new tensors that are an affine
    map of an old one, which keeps its values.  Every other tensor that is still there must hold what it held.
    """

    maps: dict[str, AffineMap] = field(default_factory=dict[str, AffineMap])
    moved: set[str] = field(default_factory=set[str])
    derived: dict[str, tuple[str, AffineMap]] = field(default_factory=dict[str, tuple[str, AffineMap]])

    def map(self, names: Iterable[str], change: AffineMap) -> None:
        """The tensors `names` moved by `change`."""
        self.maps.update(dict.fromkeys(names, change))

    def move(self, names: Iterable[str]) -> None:
        """The tensors `names` moved, those with a map by that."""
        self.moved.update(name for name in names if name not in self.maps)
