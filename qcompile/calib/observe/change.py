"""How a tensor's values changed, and which statistics follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.extrema import MinMax, MinMaxStat
from qcompile.calib.observe.observer import Probe, Told
from qcompile.calib.observe.rows import Rows, RowsStat

FOLD_ROWS = 512


@dataclass(frozen=True)
class FoldStat:
    """The answer to a `Foldable`: extremes by channel and a sample of rows."""

    extremes: MinMaxStat
    rows: RowsStat


@dataclass(frozen=True)
class Foldable:
    """What is asked of a tensor that is folded: both answers follow the fold, so that `annotate` needs no other sweep."""

    extremes: Probe[MinMaxStat]
    rows: Probe[RowsStat]

    @classmethod
    def of(cls, value: ir.Value) -> Foldable:
        """Channels are the last axis."""
        return cls(MinMax(-1).of(value), Rows(FOLD_ROWS).of(value))

    @property
    def probes(self) -> tuple[Probe[MinMaxStat], Probe[RowsStat]]:
        """Both."""
        return self.extremes, self.rows

    def told(self, told: Told) -> FoldStat:
        """Both answers."""
        return FoldStat(told[self.extremes], told[self.rows])


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
