"""Keys: K = x W_k + c_k loses k0, and q and k share their ranges; the softmax sees nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.passes.equivalent.center.shift import BARRIERS, PAYS, Shift, extremes, largest, layout_refusal, note_map
from qcompile.pipeline.base import PassContext
from qcompile.rewrite.linear import fresh, scale_outputs, shift_outputs
from qcompile.structure import Attention, Linear, find_attentions
from qcompile.structure.attention import trace_linear
from qcompile.structure.channels.heads import Projection
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.core import label, names_between
from qcompile.structure.scores import Scores, find_scores
from qcompile.structure.values import overlaps

F64 = NDArray[np.float64]
_MASKED = -1e3  # a score that a Where puts in place of masked ones: its probability is 0 with and without the shift


@dataclass(frozen=True)
class Keys:
    """Centre the keys (`k`), or `drop` their bias, and `balance` q against k."""

    k: bool
    drop: bool
    balance: bool

    def probes(self, model: Model) -> Iterator[Probe]:
        """Per-channel extremes of queries and keys."""
        projections = (p.linear for a in self._attentions(model) for p in (a.q, a.k))
        yield from (MinMax(-1).of(linear.output) for linear in projections if linear.channel_axis == -1)

    def apply(self, model: Model, ctx: PassContext, changes: Changes) -> bool:
        """Every attention whose scores allow it."""
        done = [self._keys(model.graph, a, ctx, changes) for a in self._attentions(model)]
        return any(done)

    def _attentions(self, model: Model) -> Iterator[Attention]:
        yield from (a for a in find_attentions(model.graph) if self.k or self.drop or self.balance)

    def _keys(self, graph: ir.Graph, a: Attention, ctx: PassContext, changes: Changes) -> bool:
        reason = _key_refusal(a) or ctx.selection.any_excluded((a.q.linear.node, a.k.linear.node))
        if reason:
            ctx.remarks.missed(str(a.scores.name), f"keys not centred: {reason}")
            return False
        shift = self._key_shift(a, ctx)
        if shift.refusal and not self.balance:
            why = f"keys not centred: {shift.refusal}"
            ctx.remarks.missed(str(a.scores.name), why, largest=shift.before, centred=shift.after)
            return False
        moved = set(_attention_names(a))
        if not shift.refusal:
            shift_outputs(graph, a.k.linear, -shift.t)
        if self.balance:
            self._balance(a, shift.top, ctx)
            changes.move(moved)
        else:
            note_map(changes, a.k.linear, np.ones_like(shift.t), shift.t, moved)
        done = "bias of the keys dropped" if self.drop else "keys centred"
        what = [done] * (not shift.refusal) + ["q and k balanced"] * self.balance
        ctx.remarks.applied(str(a.scores.name), ", ".join(what), largest=shift.before, centred=shift.after)
        return True

    def _key_shift(self, a: Attention, ctx: PassContext) -> Shift:
        """k0 of each output channel of the keys' projection, or why it stays 0."""
        assert a.k.columns is not None
        lo, hi = extremes(a.k.linear, ctx)
        used, none = np.unique(a.k.columns), np.zeros_like(lo)
        refusal = _shift_refusal(a) if self.k or self.drop else "not asked for"
        wanted = _bias(a.k.linear) if self.drop else (lo + hi) / 2
        t = none.copy()
        t[used] = wanted[used]
        before, after = (largest(lo[used] - x[used], hi[used] - x[used]) for x in (none, t))
        if refusal is None and self.drop and not t.any():
            refusal = "they have no bias"
        if refusal is None and not self.drop and after > PAYS * before:
            refusal = "they are centred already"
        return Shift(t, lo, hi, before, after, None) if refusal is None else Shift(none, lo, hi, before, before, refusal)

    def _balance(self, a: Attention, k_top: F64, ctx: PassContext) -> None:
        """One r for each key channel; query heads that share a key share it."""
        q_lo, q_hi = extremes(a.q.linear, ctx)
        q_top = np.maximum(-q_lo, q_hi)
        assert a.q.columns is not None and a.k.columns is not None
        highest = np.zeros(a.k.linear.out_channels)
        np.maximum.at(highest, a.k.columns, q_top[a.q.columns])
        usable = (highest > 1e-8 * highest.max()) & (k_top > 1e-8 * k_top[a.k.columns].max())
        ratio = np.sqrt(np.where(usable, highest, 1.0) / np.where(usable, np.maximum(k_top, 1e-30), 1.0))
        r = np.where(usable, np.clip(ratio, 1e-3, 1e3), 1.0)
        up, down = np.ones(a.k.linear.out_channels), np.ones(a.q.linear.out_channels)
        up[a.k.columns], down[a.q.columns] = r[a.k.columns], 1 / r[a.k.columns]
        scale_outputs(a.k.linear, up)
        scale_outputs(a.q.linear, down)


def _bias(linear: Linear) -> F64:
    bias = const_array(fresh(linear).bias)
    return np.broadcast_to(np.zeros(1) if bias is None else bias.astype(np.float64).reshape(-1), (linear.out_channels,))


def _key_refusal(a: Attention) -> str | None:
    if a.has_rope:
        return "a rotary embedding stands between the bias and the scores"
    if a.has_qk_norm:
        return "a norm stands between the projection and the scores"
    if a.q.columns is None or a.k.columns is None or a.q.columns.shape != a.k.columns.shape:
        return "the channels of q and k cannot be followed"
    shared = set(np.unique(a.q.columns)) & set(np.unique(a.k.columns)) if a.q.linear.node is a.k.linear.node else set[int]()
    if shared:
        return "q and k are the same channels"
    return layout_refusal(a.q.linear, a.k.linear) or _read_elsewhere(a.q, a.scores, 0) or _read_elsewhere(a.k, a.scores, 1)


def _read_elsewhere(projection: Projection, scores: ir.Node, slot: int) -> str | None:
    """What but the scores reads the channels of a projection, or why that is not known."""
    traced = trace_linear(projection.linear)
    if traced is None or projection.columns is None:
        return "its rank is unknown: run canonicalize"
    used = np.unique(projection.columns)
    for value, layout in traced.outputs:
        if overlaps(layout, used):
            return f"{value.name} is a graph output"
    others = (x.node for x in traced.arrivals if not (x.node is scores and x.slot == slot) and overlaps(x.layout, used))
    other = next(others, None)
    if other is not None:
        return f"{label(other)} reads them too"
    return next((x.reason for x in traced.lost if overlaps(x.layout, used)), None)


def _shift_refusal(a: Attention) -> str | None:
    """Why q . k0, which is constant along the keys, would not drop out of the softmax."""
    scores, traced = find_scores(a.softmax), trace_linear(a.k.linear)
    if not isinstance(scores, Scores) or traced is None or traced.filled:
        return "a constant is written between the keys"
    return next((f"{label(n)} changes the scores before the softmax" for n in scores.between if not _keeps_shift(n)), None)


def _keeps_shift(node: ir.Node) -> bool:
    if node.op_type == "Where":
        fills = [f for v in node.inputs[1:] if (f := const_array(v)) is not None]
        return len(fills) == 1 and bool((fills[0] <= _MASKED).all())
    if node.op_type in ("Mul", "Div"):
        return any(is_scaling(node, slot) for slot in range(2))
    return node.op_type not in ("Tanh", "Clip", "Max", "Min")


def _attention_names(a: Attention) -> Iterator[str]:
    """From the projections to the softmax: a shift of the keys moves the scores too."""
    return names_between([a.q.linear.node, a.k.linear.node], a.softmax, *BARRIERS)
