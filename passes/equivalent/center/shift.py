"""A shift of channels, and what is noted of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.pipeline.base import PassContext
from qcompile.rewrite.linear import fresh
from qcompile.structure import Linear

F64 = NDArray[np.float64]
BARRIERS = ("Softmax", "LayerNormalization")
PAYS = 0.9  # a shift that lowers the largest magnitude by less than 10 % is not worth touching weights


@dataclass(frozen=True, eq=False)
class Shift:
    """t of each channel in [lo, hi], the largest magnitude before and after, and why t is 0 if it is."""

    t: F64
    lo: F64
    hi: F64
    before: float
    after: float
    refusal: str | None

    @property
    def top(self) -> F64:
        """The largest magnitude of each shifted channel."""
        return np.maximum(self.t - self.lo, self.hi - self.t)


def largest(lo: F64, hi: F64) -> float:
    """The largest magnitude of values in [lo, hi]."""
    return float(np.maximum(-lo, hi).max(initial=0.0))


def centre(lo: F64, hi: F64) -> tuple[F64, float, float]:
    """(t, the largest magnitude before, and after)."""
    t = (lo + hi) / 2
    return t, largest(lo, hi), largest(lo - t, hi - t)


def extremes(linear: Linear, ctx: PassContext) -> tuple[F64, F64]:
    """What was measured of a projection's channels; a bias that this pass put behind it makes it what the product was."""
    stat = ctx.told.get(MinMax(-1).of(linear.output)) or ctx.told[MinMax(-1).of(linear.node.outputs[0])]
    return stat.lo, stat.hi


def note_map(changes: Changes, linear: Linear, r: F64, t: F64, moved: set[str]) -> None:
    """The linear's output becomes (y - t) / r (on top of an earlier map of other channels), what stands behind it somehow."""
    for name in _outputs(fresh(linear)) - changes.moved:
        earlier = changes.maps.get(name, AffineMap(np.ones_like(t), np.zeros_like(t)))
        changes.maps[name] = AffineMap(earlier.r * r, earlier.t + earlier.r * t)
    changes.move(moved)


def layout_refusal(*linears: Linear) -> str | None:
    """Why the channels of projections are not the last axis."""
    return "a projection is a convolution" if any(x.channel_axis != -1 for x in linears) else None


def _outputs(linear: Linear) -> set[str]:
    return {str(linear.output.name)} | ({str(linear.node.outputs[0].name)} if linear.bias_node is linear.node else set[str]())
