"""center: shifts that attention and norms absorb, so that symmetric codes waste no range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observers import MinMax, MinMaxStat, Probe
from qcompile.ir.linear_edit import absorb_shift, add_to_bias, fresh, scale_outputs
from qcompile.ir.match import Attention, Linear, VProjection, find_attentions, find_v_projections
from qcompile.ir.match_attention import trace_linear
from qcompile.ir.match_core import label, names_between
from qcompile.ir.match_heads import Projection
from qcompile.ir.match_scores import Scores, find_scores
from qcompile.ir.match_trace import is_scaling
from qcompile.ir.match_values import overlaps
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.passes._affine_fold import Folded, FoldSite, fold, hidden_sites, norm_sites
from qcompile.pipeline.base import AffineMap, Fact, Kind, Pass, PassContext, PassResult, quantized_forms
from qcompile.quant.spec import Scheme
from qcompile.target.target import Target

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
    balance: q_d / r_d and k_d r_d, r_d = sqrt(max|q_d| / max|k_d|) in each head channel, leaves q . k as it is.
    gelu: a Sub behind GELU, undone in the bias of the next linear (one more pointwise operator); behind the Mul of `smooth`
    it finds no site, smooth{shift} does both in one.
    Exact in float on every target, without a new node but for gelu.
    Zero points of asymmetric codes do the same for free, so this pays where zero points must be 0.
    Refused: K behind a rotary embedding or a norm, K or V that something else reads (a cache), scores that a Tanh, a Clip or
    a product changes before the softmax.
    """

    name = "center"
    kind = Kind.EQUIVALENT
    requires = frozenset({Fact.CANONICAL})
    k: Annotated[bool, "centre the keys"] = True
    v: Annotated[bool, "centre the values"] = True
    norm: Annotated[bool, "centre the outputs of LayerNorms"] = True
    balance: Annotated[bool, "give q and k equal ranges in each channel"] = False
    gelu: Annotated[bool, "centre the hidden layer of MLPs by a Sub"] = False

    def required(self, target: Target, scheme: Scheme) -> frozenset[Fact]:
        """The graph's final form, so that this pass's sweep also serves others."""
        return self.requires | quantized_forms(target, scheme)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Per-channel extremes of everything that may be shifted."""
        names: dict[str, None] = {}
        for site in self._sites(model, ctx):
            names[str(site.tensor.name)] = None
        for a in self._attentions(model):
            names |= {str(p.linear.output.name): None for p in (a.q, a.k) if p.linear.channel_axis == -1}
        for m in self._values(model):
            names[str(m.linear.output.name)] = None
        return [Probe(name, MinMax(-1)) for name in names]

    def may_change(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """Superset of the tensors that move."""
        for site in self._sites(model, ctx):
            yield from site.moved
        for a in self._attentions(model):
            yield from _attention_names(a)
        for m in self._values(model):
            yield from names_between([m.linear.node], m.out.node, *_BARRIERS)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Shift every site that is free; remark on the others."""
        if ctx.scheme.activation is None:
            ctx.missed("", "the scheme leaves activations in float, nothing to centre")
            return PassResult(False)
        out = Folded()
        for site in self._sites(model, ctx, remark=True):
            self._shift_site(model.graph, site, ctx, out)
        for a in self._attentions(model):
            self._keys(model.graph, a, ctx, out)
        for m in self._values(model):
            self._value(model.graph, m, ctx, out)
        return out.result(any(r.kind == "applied" for r in ctx.remarks))

    def _sites(self, model: Model, ctx: PassContext, remark: bool = False) -> list[FoldSite]:
        sites = norm_sites(model.graph, ctx, remark) if self.norm else []
        return sites + [s for s in (hidden_sites(model.graph, ctx, remark) if self.gelu else []) if not s.free]

    def _attentions(self, model: Model) -> Iterator[Attention]:
        yield from (a for a in find_attentions(model.graph) if self.k or self.balance)

    def _values(self, model: Model) -> Iterator[VProjection]:
        yield from find_v_projections(model.graph) if self.v else ()

    # ---- norm outputs and GELU ------------------------------------------------------------------------------------

    def _shift_site(self, graph: ir.Graph, site: FoldSite, ctx: PassContext, out: Folded) -> None:
        reason = site.shift_refusal or ctx.any_excluded(x.node for x in site.linears)
        stat = ctx.stats[Probe(str(site.tensor.name), MinMax(-1))]
        assert isinstance(stat, MinMaxStat)
        if reason or stat.lo.shape != (site.linears[0].in_channels,):
            ctx.missed(str(site.anchor.name), reason or "the measured channels do not match the weight's rows")
            return
        t, before, after = _centre(stat.lo, stat.hi)
        if after > _PAYS * before:
            ctx.missed(str(site.anchor.name), "already centred: the range would hardly shrink", largest=before, centred=after)
            return
        fold(graph, site, np.ones_like(t), t, ctx, out, claims=False)
        ctx.applied(str(site.anchor.name), f"{site.kind} output centred", largest=before, centred=after)

    # ---- attention ------------------------------------------------------------------------------------------------

    def _keys(self, graph: ir.Graph, a: Attention, ctx: PassContext, out: Folded) -> None:
        reason = _key_refusal(a) or ctx.any_excluded((a.q.linear.node, a.k.linear.node))
        if reason:
            ctx.missed(str(a.scores.name), f"keys not centred: {reason}")
            return
        assert a.k.columns is not None
        moved = set(_attention_names(a))
        lo, hi = _extremes(a.k.linear, ctx)
        used = np.unique(a.k.columns)
        before = after = float(np.maximum(-lo, hi)[used].max())
        t = np.zeros_like(lo)
        refusal = _shift_refusal(a) if self.k else "not asked for"
        if refusal is None:
            t[used], before, after = _centre(lo[used], hi[used])
        if after > _PAYS * before and not self.balance:
            why = refusal or "they are centred already"
            ctx.missed(str(a.scores.name), f"keys not centred: {why}", largest=before, centred=after)
            return
        if t.any():
            add_to_bias(graph, a.k.linear, -t)
        if self.balance:
            self._balance(a, np.maximum(t - lo, hi - t), ctx)
            out.changed |= moved
        else:
            _note_shift(out, a.k.linear, t, moved)
        what = ["keys centred"] * bool(t.any()) + ["q and k balanced"] * self.balance
        ctx.applied(str(a.scores.name), ", ".join(what), largest=before, centred=after)

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

    def _value(self, graph: ir.Graph, m: VProjection, ctx: PassContext, out: Folded) -> None:
        reason = m.shift_refusal or ctx.any_excluded((m.linear.node, m.out.node)) or _layout_refusal(m.linear, m.out)
        if reason:
            ctx.missed(str(m.attention.pv.name), f"values not centred: {reason}")
            return
        lo, hi = _extremes(m.linear, ctx)
        t = np.zeros_like(lo)
        t[m.v_columns], before, after = _centre(lo[m.v_columns], hi[m.v_columns])
        if after > _PAYS * before:
            ctx.missed(str(m.attention.pv.name), "values are centred already", largest=before, centred=after)
            return
        moved = set(names_between([m.linear.node], m.out.node, *_BARRIERS))
        add_to_bias(graph, m.linear, -t)
        absorb_shift(graph, m.out, t[m.columns])
        _note_shift(out, m.linear, t, moved)
        ctx.applied(str(m.attention.pv.name), "values centred", largest=before, centred=after)


def _centre(lo: F64, hi: F64) -> tuple[F64, float, float]:
    """(t, the largest magnitude before, and after)."""
    t = (lo + hi) / 2
    return t, float(np.maximum(-lo, hi).max(initial=0.0)), float(((hi - lo) / 2).max(initial=0.0))


def _extremes(linear: Linear, ctx: PassContext) -> tuple[F64, F64]:
    stat = ctx.stats[Probe(str(linear.output.name), MinMax(-1))]
    assert isinstance(stat, MinMaxStat)
    return stat.lo, stat.hi


def _note_shift(out: Folded, linear: Linear, t: F64, moved: set[str]) -> None:
    """The linear's output moves by t (on top of an earlier shift of other channels), what stands behind it somehow."""
    for name in _outputs(fresh(linear)) - out.changed:
        earlier = out.maps.get(name)
        out.maps[name] = AffineMap(np.ones_like(t), t if earlier is None else t + earlier.t)
    out.changed |= moved - set(out.maps)


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
    return names_between([a.q.linear.node, a.k.linear.node], a.scores, *_BARRIERS)


def _outputs(linear: Linear) -> set[str]:
    return {str(linear.output.name)} | ({str(linear.node.outputs[0].name)} if linear.bias_node is linear.node else set[str]())
