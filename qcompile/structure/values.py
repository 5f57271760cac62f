"""V -> output projection: the places where a per-channel map of the values is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.structure.attention import Attention, find_attentions, trace_linear
from qcompile.structure.channels.heads import all_columns
from qcompile.structure.channels.layout import Layout
from qcompile.structure.channels.trace import Trace
from qcompile.structure.core import Matches, Refusal, label, once, sorted_out
from qcompile.structure.linear import Linear


@dataclass(frozen=True)
class VProjection:
    """V' = (V - v0) / s on the output channels `v_columns` of `linear` folds into it and into the rows of `out`.

    Row i of `out`'s weight reads channel `columns[i]` of `linear`; grouped-query attention repeats channels.  `shift_refusal`
    says why v0 must stay 0 (rows of P that do not sum to 1), or is None.
    """

    attention: Attention
    linear: Linear
    v_columns: NDArray[np.int64]
    out: Linear
    columns: NDArray[np.int64]
    shift_refusal: str | None

    @property
    def shift_ok(self) -> bool:
        """True if a shift v0 may be folded too."""
        return self.shift_refusal is None


@once
def find_v_projections(graph: ir.Graph) -> Matches[VProjection]:
    """The legal sites, and for every other attention the reason (those that `find_attentions` refused included)."""
    attentions = find_attentions(graph)
    return sorted_out((match_v_projection(attention) for attention in attentions), attentions.refused)


def match_v_projection(attention: Attention) -> VProjection | Refusal:
    """The site of one attention block, or why V cannot be scaled for free."""
    v, out, columns = attention.v, attention.out, attention.out_columns
    traced = trace_linear(v.linear)
    if out is None or columns is None:
        return Refusal(attention.pv, attention.out_refusal or "no output projection")
    if v.columns is None or traced is None:
        return Refusal(attention.pv, "the channels of v cannot be followed")
    used = np.unique(v.columns)
    reason = next(_other_readers(traced, attention, used), None)
    if reason is not None:
        return Refusal(attention.pv, reason)
    return VProjection(attention, v.linear, used, out, columns, _shift_refusal(attention, traced))


def _other_readers(traced: Trace, attention: Attention, used: NDArray[np.int64]) -> Iterator[str]:
    for value, layout in traced.outputs:
        if overlaps(layout, used):
            yield f"v is the graph output {value.name}"
    for arrival in traced.arrivals:
        at_values = arrival.node is attention.pv and arrival.slot == attention.values.slot
        if not at_values and overlaps(arrival.layout, used):
            yield f"v also feeds {label(arrival.node)}"
    for lost in traced.lost:
        if overlaps(lost.layout, used):
            yield lost.reason


def overlaps(layout: Layout, used: NDArray[np.int64]) -> bool:
    """Whether a value laid out so may hold one of the channels `used`."""
    numbers = all_columns(layout)
    return numbers is None or bool(np.isin(numbers, used).any())


def _shift_refusal(attention: Attention, traced: Trace) -> str | None:
    if attention.values.changed:
        return f"{label(attention.values.changed[0])} changes the probabilities, whose rows no longer sum to 1"
    if traced.filled:
        return f"{label(traced.filled[0])} writes a constant between the values"
    return None
