"""Attention heads as columns of a projection's weight, read off the layout in front of a MatMul."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.structure.channels.layout import Axis, Layout, columns_of
from qcompile.structure.linear import Linear


@dataclass(frozen=True, eq=False)
class Projection:
    """One of q, k, v: `columns[h, d]` is the output channel of `linear` that head h reads as element d.

    `columns` has shape [heads, head_dim], one row a query head: grouped-query attention repeats rows.  It is None when the
    channels cannot be followed (rotary embedding, a norm on q or k).
    """

    linear: Linear
    columns: NDArray[np.int64] | None


def head_columns(layout: Layout, head_dim_axis: int) -> NDArray[np.int64] | None:
    """Columns [heads, head_dim] of an operand of a batched MatMul whose `head_dim_axis` (-1 or -2) is summed or kept per head."""
    index, other = layout.index(head_dim_axis), layout.index(-3 - head_dim_axis)
    if index is None or other is None or layout.holds_channels(other) or not layout.holds_channels(index):
        return None
    heads = [f for i, axis in enumerate(layout.axes) if i not in (index, other) for f in head_factors(axis)]
    outer, inner = columns_of(heads), columns_of(layout.axes[index], layout.offset)
    return None if outer is None or inner is None else outer[:, None] + inner[None, :]


def head_factors(axis: Axis) -> Axis:
    """The factors of a batch axis from the first channel factor on: heads and their copies, not the batch in front."""
    first = next((i for i, f in enumerate(axis) if f.stride), len(axis))
    return axis[first:]


def all_columns(layout: Layout) -> NDArray[np.int64] | None:
    """Every channel number that occurs in a tensor, sorted; None if a size is unknown."""
    numbers = columns_of(layout.channel_factors(), layout.offset)
    return None if numbers is None else np.unique(numbers)
