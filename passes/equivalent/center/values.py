"""Values: P V W_o + c_o = P (V - v0) W_o + (c_o + v0 W_o), and one scale for all heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.equivalent.center.shift import BARRIERS, PAYS, Shift, centre, extremes, layout_refusal, note_map
from qcompile.pipeline.base import PassContext
from qcompile.rewrite.linear import absorb_shift, divide_outputs, scale_inputs, shift_outputs
from qcompile.structure import VProjection, find_v_projections
from qcompile.structure.core import names_between

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Centre the values (`v`), and give those of all `heads` one range."""

    v: bool
    heads: bool

    def probes(self, model: Model) -> Iterator[Probe]:
        """Per-channel extremes of the values."""
        yield from (MinMax(-1).of(m.linear.output) for m in self._values(model))

    def apply(self, model: Model, ctx: PassContext, changes: Changes) -> bool:
        """Every projection of values whose output projection undoes it."""
        done = [self._value(model.graph, m, ctx, changes) for m in self._values(model)]
        return any(done)

    def _values(self, model: Model) -> Iterator[VProjection]:
        yield from find_v_projections(model.graph) if self.v or self.heads else ()

    def _value(self, graph: ir.Graph, m: VProjection, ctx: PassContext, changes: Changes) -> bool:
        reason = m.shift_refusal or ctx.selection.any_excluded((m.linear.node, m.out.node)) or layout_refusal(m.linear, m.out)
        if reason:
            ctx.remarks.missed(str(m.attention.pv.name), f"values not centred: {reason}")
            return False
        shift = self._value_shift(m, ctx)
        s = _head_scales(m, shift.top) if self.heads else np.ones_like(shift.t)
        if shift.refusal and np.all(s == 1):
            what = "of like ranges" if self.heads else "centred"
            ctx.remarks.missed(str(m.attention.pv.name), f"values are {what} already", largest=shift.before, centred=shift.after)
            return False
        moved = set(names_between([m.linear.node], m.out.node, *BARRIERS))
        if not shift.refusal:
            shift_outputs(graph, m.linear, -shift.t)
            moved |= absorb_shift(graph, m.out, shift.t[m.columns])
        divide_outputs(m.linear, s)
        scale_inputs(m.out, s[m.columns])
        note_map(changes, m.linear, s, shift.t, moved)
        what = ["values centred"] * (not shift.refusal) + ["heads scaled alike"] * bool(np.any(s != 1))
        ctx.remarks.applied(str(m.attention.pv.name), ", ".join(what), largest=shift.before, centred=shift.after)
        return True

    def _value_shift(self, m: VProjection, ctx: PassContext) -> Shift:
        """v0 of each output channel of the values' projection, or why it stays 0."""
        lo, hi = extremes(m.linear, ctx)
        t, none = np.zeros_like(lo), np.zeros_like(lo)
        t[m.v_columns], before, after = centre(lo[m.v_columns], hi[m.v_columns])
        pays = self.v and after <= PAYS * before
        return Shift(t, lo, hi, before, after, None) if pays else Shift(none, lo, hi, before, after, "centred already")


def _head_scales(m: VProjection, top: F64) -> F64:
    """s of each value channel: the range of its head over the geometric mean of all heads."""
    heads = np.unique(m.attention.v.columns if m.attention.v.columns is not None else m.v_columns[None], axis=0)
    tops = top[heads].max(1)
    s = np.ones_like(top)
    if (tops > 0).all() and tops.max() * PAYS > tops.min():
        s[heads] = (tops / np.exp(np.log(tops).mean()))[:, None]
    return s
