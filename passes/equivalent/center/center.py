"""center: shifts that attention and norms absorb, so that symmetric codes waste no range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, MinMaxStat, Probe
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.passes.equivalent.center.softmax import centre_probabilities, probabilities
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.rewrite.fold import FoldSite, fold, hidden_sites, norm_sites
from qcompile.rewrite.linear import absorb_shift, divide_outputs, fresh, scale_inputs, scale_outputs, shift_outputs
from qcompile.structure import Attention, Linear, Matches, VProjection, find_attentions, find_v_projections
from qcompile.structure.attention import trace_linear
from qcompile.structure.channels.heads import Projection
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.core import joined, label, names_between
from qcompile.structure.scores import Scores, find_scores
from qcompile.structure.values import overlaps

F64 = NDArray[np.float64]
_MASKED = -1e3  # a score that a Where puts in place of masked ones: its probability is 0 with and without the shift
_BARRIERS = ("Softmax", "LayerNormalization")
_PAYS = 0.9  # a shift that lowers the largest magnitude by less than 10 % is not worth touching weights


@dataclass(frozen=True)
class Center(Pass):
    """Take the centre t = (max + min) / 2 of each channel out of a tensor where the shift costs nothing.

    before: K = x W_k + c_k            after: K - k0 by c_k - k0: q . k0 is constant along the softmax axis and drops out
    before: P V W_o + c_o              after: P (V - v0) W_o + (c_o + v0 W_o), since the rows of P sum to 1
    before: LayerNorm(g, b) -> W, c    after: LayerNorm(g, b - t) -> W, c + t W
    drop: k0 = c_k, the whole bias, which needs no range.
    balance: q_d / r_d and k_d r_d, r_d = sqrt(max|q_d| / max|k_d|) in each head channel, leaves q . k as it is.
    heads: the columns of W_v of head h / s_h and the rows of W_o that read them s_h, so that one scale fits all heads.
    gelu: a Sub behind GELU, undone in the bias of the next linear (one more pointwise operator); behind the Mul of `smooth`
    it finds no site, smooth{shift} does both in one.
    softmax: P V = (P - p0) V + p0 sum_keys V, p0 = max P / 2: a Sub, a ReduceSum, a Mul and an Add.  Its product is no longer
    in TensorRT's fused attention, and later passes find no V -> out-projection: run it last.
    Exact in float on every target, without a new node but for gelu and softmax.
    Zero points of asymmetric codes do the same for free, so this pays where zero points must be 0.
    Refused: K behind a rotary embedding or a norm, K or V that something else reads (a cache), scores that a Tanh, a Clip or
    a product changes before the softmax.
    """

    name = "center"
    kind = Kind.EQUIVALENT
    k: Annotated[bool, "centre the keys"] = True
    v: Annotated[bool, "centre the values"] = True
    norm: Annotated[bool, "centre the outputs of LayerNorms"] = True
    drop: Annotated[bool, "take the whole bias of the keys away instead of their centre"] = False
    balance: Annotated[bool, "give q and k equal ranges in each channel"] = False
    heads: Annotated[bool, "give the values of all heads one range"] = False
    gelu: Annotated[bool, "centre the hidden layer of MLPs by a Sub"] = False
    softmax: Annotated[bool, "centre the probabilities (leaves the fused attention kernel)"] = False

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Per-channel extremes of everything that may be shifted."""
        values = [site.tensor for site in self._sites(model)]
        values += [p.linear.output for a in self._attentions(model) for p in (a.q, a.k) if p.linear.channel_axis == -1]
        values += [m.linear.output for m in self._values(model)]
        yield from (MinMax(-1).of(value) for value in dict.fromkeys(values))
        yield from (_probability_probe(a) for a in self._softmaxes(model))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Shift every site that is free; remark on the others."""
        if ctx.scheme.activation is None:
            ctx.remarks.missed("", "the scheme leaves activations in float, nothing to centre")
            return PassResult(False)
        changes = Changes()
        self._remark_refused(model, ctx)
        sites = self._sites(model)
        for refusal in sites.refused:
            ctx.remarks.missed(str(refusal.node.name), refusal.reason)
        done = [self._shift_site(model.graph, site, ctx, changes) for site in sites]
        done += [self._keys(model.graph, a, ctx, changes) for a in self._attentions(model)]
        done += [self._value(model.graph, m, ctx, changes) for m in self._values(model)]
        done += [_softmax(model.graph, a, ctx, changes) for a in list(self._softmaxes(model))]
        return PassResult(any(done), changes)

    def _sites(self, model: Model) -> Matches[FoldSite]:
        norms = norm_sites(model.graph) if self.norm else Matches[FoldSite](())
        hidden = hidden_sites(model.graph) if self.gelu else Matches[FoldSite](())
        return joined((norms, Matches(tuple(s for s in hidden if not s.free), hidden.refused)))

    def _remark_refused(self, model: Model, ctx: PassContext) -> None:
        """Attention and values that no rewrite can follow."""
        attentions = find_attentions(model.graph)
        for refusal in attentions.refused if self._wants_attention() else ():
            ctx.remarks.missed(str(refusal.node.name), f"attention not centred: {refusal.reason}")
        for refusal in find_v_projections(model.graph).refused if self.v or self.heads else ():
            if refusal not in attentions.refused:
                ctx.remarks.missed(str(refusal.node.name), f"values not centred: {refusal.reason}")

    def _wants_attention(self) -> bool:
        return self.k or self.drop or self.balance or self.v or self.heads or self.softmax

    def _attentions(self, model: Model) -> Iterator[Attention]:
        yield from (a for a in find_attentions(model.graph) if self.k or self.drop or self.balance)

    def _values(self, model: Model) -> Iterator[VProjection]:
        yield from find_v_projections(model.graph) if self.v or self.heads else ()

    def _softmaxes(self, model: Model) -> Iterator[Attention]:
        yield from find_attentions(model.graph) if self.softmax else ()

    # ---- norm outputs and GELU ------------------------------------------------------------------------------------

    def _shift_site(self, graph: ir.Graph, site: FoldSite, ctx: PassContext, changes: Changes) -> bool:
        reason = site.shift_refusal or ctx.selection.any_excluded(x.node for x in site.linears)
        stat = ctx.told[MinMax(-1).of(site.tensor)]
        if reason or stat.lo.shape != (site.linears[0].in_channels,):
            ctx.remarks.missed(str(site.anchor.name), reason or "the measured channels do not match the weight's rows")
            return False
        t, before, after = _centre(stat.lo, stat.hi)
        if after > _PAYS * before:
            ctx.remarks.missed(
                str(site.anchor.name), "already centred: the range would hardly shrink", largest=before, centred=after
            )
            return False
        fold(graph, site, np.ones_like(t), t, changes)
        ctx.remarks.applied(str(site.anchor.name), f"{site.kind} output centred", largest=before, centred=after)
        return True

    # ---- attention ------------------------------------------------------------------------------------------------

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
            _note_map(changes, a.k.linear, np.ones_like(shift.t), shift.t, moved)
        done = "bias of the keys dropped" if self.drop else "keys centred"
        what = [done] * (not shift.refusal) + ["q and k balanced"] * self.balance
        ctx.remarks.applied(str(a.scores.name), ", ".join(what), largest=shift.before, centred=shift.after)
        return True

    def _key_shift(self, a: Attention, ctx: PassContext) -> _Shift:
        """k0 of each output channel of the keys' projection, or why it stays 0."""
        assert a.k.columns is not None
        lo, hi = _extremes(a.k.linear, ctx)
        used, none = np.unique(a.k.columns), np.zeros_like(lo)
        refusal = _shift_refusal(a) if self.k or self.drop else "not asked for"
        wanted = _bias(a.k.linear) if self.drop else (lo + hi) / 2
        t = none.copy()
        t[used] = wanted[used]
        before, after = (_largest(lo[used] - x[used], hi[used] - x[used]) for x in (none, t))
        if refusal is None and self.drop and not t.any():
            refusal = "they have no bias"
        if refusal is None and not self.drop and after > _PAYS * before:
            refusal = "they are centred already"
        return _Shift(t, lo, hi, before, after, None) if refusal is None else _Shift(none, lo, hi, before, before, refusal)

    def _balance(self, a: Attention, k_top: F64, ctx: PassContext) -> None:
        """One r for each key channel; query heads that share a key share it."""
        q_lo, q_hi = _extremes(a.q.linear, ctx)
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

    def _value(self, graph: ir.Graph, m: VProjection, ctx: PassContext, changes: Changes) -> bool:
        reason = m.shift_refusal or ctx.selection.any_excluded((m.linear.node, m.out.node)) or _layout_refusal(m.linear, m.out)
        if reason:
            ctx.remarks.missed(str(m.attention.pv.name), f"values not centred: {reason}")
            return False
        shift = self._value_shift(m, ctx)
        s = _head_scales(m, shift.top) if self.heads else np.ones_like(shift.t)
        if shift.refusal and np.all(s == 1):
            what = "of like ranges" if self.heads else "centred"
            ctx.remarks.missed(str(m.attention.pv.name), f"values are {what} already", largest=shift.before, centred=shift.after)
            return False
        moved = set(names_between([m.linear.node], m.out.node, *_BARRIERS))
        if not shift.refusal:
            shift_outputs(graph, m.linear, -shift.t)
            moved |= absorb_shift(graph, m.out, shift.t[m.columns])
        divide_outputs(m.linear, s)
        scale_inputs(m.out, s[m.columns])
        _note_map(changes, m.linear, s, shift.t, moved)
        what = ["values centred"] * (not shift.refusal) + ["heads scaled alike"] * bool(np.any(s != 1))
        ctx.remarks.applied(str(m.attention.pv.name), ", ".join(what), largest=shift.before, centred=shift.after)
        return True

    def _value_shift(self, m: VProjection, ctx: PassContext) -> _Shift:
        """v0 of each output channel of the values' projection, or why it stays 0."""
        lo, hi = _extremes(m.linear, ctx)
        t, none = np.zeros_like(lo), np.zeros_like(lo)
        t[m.v_columns], before, after = _centre(lo[m.v_columns], hi[m.v_columns])
        pays = self.v and after <= _PAYS * before
        return _Shift(t, lo, hi, before, after, None) if pays else _Shift(none, lo, hi, before, after, "centred already")


def _head_scales(m: VProjection, top: F64) -> F64:
    """s of each value channel: the range of its head over the geometric mean of all heads."""
    heads = np.unique(m.attention.v.columns if m.attention.v.columns is not None else m.v_columns[None], axis=0)
    tops = top[heads].max(1)
    s = np.ones_like(top)
    if (tops > 0).all() and tops.max() * _PAYS > tops.min():
        s[heads] = (tops / np.exp(np.log(tops).mean()))[:, None]
    return s


def _softmax(graph: ir.Graph, a: Attention, ctx: PassContext, changes: Changes) -> bool:
    reason, stat = ctx.selection.any_excluded((a.softmax, a.pv)), ctx.told[_probability_probe(a)]
    t, before, after = _centre(stat.lo, stat.hi)
    if reason or after > _PAYS * before:
        ctx.remarks.missed(str(a.softmax.name), reason or "probabilities are centred already", largest=before, centred=after)
        return False
    changes.move([str(a.pv.outputs[0].name)])
    centre_probabilities(graph, a.values, float(t))
    ctx.remarks.applied(str(a.softmax.name), "probabilities centred", largest=before, centred=after)
    return True


def _probability_probe(a: Attention) -> Probe[MinMaxStat]:
    return MinMax().of(probabilities(a.values))


@dataclass(frozen=True, eq=False)
class _Shift:
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


def _largest(lo: F64, hi: F64) -> float:
    return float(np.maximum(-lo, hi).max(initial=0.0))


def _centre(lo: F64, hi: F64) -> tuple[F64, float, float]:
    """(t, the largest magnitude before, and after)."""
    t = (lo + hi) / 2
    return t, _largest(lo, hi), _largest(lo - t, hi - t)


def _extremes(linear: Linear, ctx: PassContext) -> tuple[F64, F64]:
    stat = ctx.told[MinMax(-1).of(linear.output)]
    return stat.lo, stat.hi


def _bias(linear: Linear) -> F64:
    bias = const_array(fresh(linear).bias)
    return np.broadcast_to(np.zeros(1) if bias is None else bias.astype(np.float64).reshape(-1), (linear.out_channels,))


def _note_map(changes: Changes, linear: Linear, r: F64, t: F64, moved: set[str]) -> None:
    """The linear's output becomes (y - t) / r (on top of an earlier map of other channels), what stands behind it somehow."""
    for name in _outputs(fresh(linear)) - changes.moved:
        earlier = changes.maps.get(name, AffineMap(np.ones_like(t), np.zeros_like(t)))
        changes.maps[name] = AffineMap(earlier.r * r, earlier.t + earlier.r * t)
    changes.move(moved)


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
    return _layout_refusal(a.q.linear, a.k.linear) or _read_elsewhere(a.q, a.scores, 0) or _read_elsewhere(a.k, a.scores, 1)


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


def _layout_refusal(*linears: Linear) -> str | None:
    return "a projection is a convolution" if any(x.channel_axis != -1 for x in linears) else None


def _attention_names(a: Attention) -> Iterator[str]:
    """From the projections to the softmax: a shift of the keys moves the scores too."""
    return names_between([a.q.linear.node, a.k.linear.node], a.softmax, *_BARRIERS)


def _outputs(linear: Linear) -> set[str]:
    return {str(linear.output.name)} | ({str(linear.node.outputs[0].name)} if linear.bias_node is linear.node else set[str]())
