"""Softmax attention: projections, scores, scale, mask, softmax, P V and the output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir import ops
from qcompile.ir.shapes import dims, rank
from qcompile.structure.channels.heads import Projection, head_columns
from qcompile.structure.channels.layout import Layout, token
from qcompile.structure.channels.trace import Trace, start_layout, trace
from qcompile.structure.core import Matches, Refusal, label, once, sorted_out
from qcompile.structure.linear import Linear, linears_by_output, match_linear
from qcompile.structure.norm import Norm, find_norms
from qcompile.structure.scores import Scores, Values, find_scores, find_values, scaling_nodes
from qcompile.structure.sources import Source, find_source

Part = Literal["q", "k", "v"]
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_ANCHORS = _FUSED | {"Softmax"}


@dataclass(frozen=True)
class Attention:
    """softmax(scale * q k^T + mask) v, between its projections.

    `q`, `k`, `v` share one linear when the projection is `packed`.  `out` is the output projection and `out_columns[i]` the
    output channel of `v.linear` that becomes its input channel i; both are None when `out_refusal` says why.  `scales` are the
    Mul / Div nodes by one number on q, k or the scores, `masks` the nodes that add to or select from the scores.
    """

    q: Projection
    k: Projection
    v: Projection
    scores: ir.Node
    scales: tuple[ir.Node, ...]
    masks: tuple[ir.Node, ...]
    softmax: ir.Node
    values: Values[ir.Node]
    out: Linear | None
    out_columns: NDArray[np.int64] | None
    out_refusal: str | None
    has_rope: bool
    has_qk_norm: bool

    @property
    def pv(self) -> ir.Node:
        """The MatMul of probabilities and values."""
        return self.values.matmul

    @property
    def packed(self) -> bool:
        """True if q, k and v are columns of one weight."""
        return self.q.linear is self.k.linear is self.v.linear

    @property
    def heads(self) -> int | None:
        """Number of query heads, or None if the layout is not known."""
        return None if self.v.columns is None else len(self.v.columns)

    @property
    def head_dim(self) -> int | None:
        """Channels of one value head."""
        return None if self.v.columns is None else self.v.columns.shape[1]

    def projection(self, part: Part) -> Projection:
        """The projection named `part`."""
        return {"q": self.q, "k": self.k, "v": self.v}[part]


def head_channel_columns(attention: Attention, part: Part, head: int) -> NDArray[np.int64] | None:
    """Output channels of the projection `part` that make head `head`, in the order of d; shape [head_dim]."""
    columns = attention.projection(part).columns
    return None if columns is None else columns[head]


@once
def find_attentions(graph: ir.Graph) -> Matches[Attention]:
    """All attention blocks around a Softmax over the last axis; fused Attention operators are refused."""
    finder = _Finder(linears_by_output(graph), {norm.output: norm for norm in find_norms(graph)})
    return sorted_out(finder.match(node) for node in graph if node.op_type in _ANCHORS)


def trace_linear(linear: Linear) -> Trace | None:
    """Where the output channels of a linear go, through movement and scaling by one number; None if a needed rank is unknown."""
    layout = start_layout(linear.output, linear.out_channels, linear.channel_axis)
    return None if layout is None else trace(linear.output, layout, scaling=True)


class _Finder:
    def __init__(self, linears: dict[ir.Value, Linear], norms: dict[ir.Value, Norm]) -> None:
        self.linears, self.norms = linears, norms
        self.traces: dict[Linear, Trace | None] = {}

    def match(self, node: ir.Node) -> Attention | Refusal | None:
        if node.op_type in _FUSED:
            return Refusal(node, f"fused {node.op_type} operator: canonicalize takes it apart where a target quantizes inside")
        scores = find_scores(node)
        if not isinstance(scores, Scores):
            return scores
        if not _over_last_axis(node):
            return Refusal(node, "softmax is not over the last axis")
        values = find_values(node)
        if values is None:
            return Refusal(node, "its probabilities do not go to one MatMul with computed values")
        return self._with_sources(node, scores, values)

    def _with_sources(self, softmax: ir.Node, scores: Scores[ir.Node], values: Values[ir.Node]) -> Attention | Refusal:
        operands = (*scores.matmul.inputs[:2], values.matmul.inputs[values.slot])
        sources = [None if v is None else find_source(v, self.linears, self.norms) for v in operands]
        missing = [name for name, source in zip("qkv", sources, strict=True) if source is None]
        if missing:
            return Refusal(softmax, f"{' and '.join(missing)} does not come from a linear")
        q, k, v = (source for source in sources if source is not None)
        return self._attention(softmax, scores, values, q, k, v)

    def _attention(
        self, softmax: ir.Node, scores: Scores[ir.Node], values: Values[ir.Node], q: Source, k: Source, v: Source
    ) -> Attention:
        v_layout = self._layout(v, values.matmul, values.slot)
        out = "the channels of v cannot be followed" if v_layout is None else follow_values(v_layout, values)
        scales = (*q.scales, *k.scales, *scaling_nodes(scores.between))
        return Attention(
            q=Projection(q.linear, _columns(self._layout(q, scores.matmul, 0), -1)),
            k=Projection(k.linear, _columns(self._layout(k, scores.matmul, 1), -2)),
            v=Projection(v.linear, _columns(v_layout, -1 if values.slot else -2)),
            scores=scores.matmul,
            scales=tuple(dict.fromkeys(scales)),
            masks=tuple(n for n in scores.between if ops.is_op(n, "Add", "Sub", "Where")),
            softmax=softmax,
            values=values,
            out=None if isinstance(out, str) else out[0],
            out_columns=None if isinstance(out, str) else out[1],
            out_refusal=out if isinstance(out, str) else None,
            has_rope=q.rope or k.rope,
            has_qk_norm=q.norm or k.norm,
        )

    def _layout(self, source: Source, node: ir.Node, slot: int) -> Layout | None:
        if source.linear not in self.traces:
            self.traces[source.linear] = trace_linear(source.linear)
        traced = self.traces[source.linear]
        ends = [] if traced is None else [a.layout for a in traced.arrivals if a.node is node and a.slot == slot]
        return ends[0] if len(ends) == 1 else None


def _columns(layout: Layout | None, axis: int) -> NDArray[np.int64] | None:
    return None if layout is None else head_columns(layout, axis)


def _over_last_axis(softmax: ir.Node) -> bool:
    axis, known = ops.int_attr(softmax, "axis", -1), rank(softmax.inputs[0])
    return axis == -1 or (known is not None and axis == known - 1)


def follow_values(layout: Layout, values: Values[ir.Node]) -> tuple[Linear, NDArray[np.int64]] | str:
    """From V (laid out as `layout` in front of P V) to the output projection: (linear, columns [its in_channels]), or why not."""
    _, traced = trace_values(layout, values)
    if traced.outputs:
        return "the attention output is a graph output"
    if traced.lost:
        return traced.lost[0].reason
    if len(traced.arrivals) != 1:
        return f"the attention output feeds {len(traced.arrivals)} nodes"
    end = traced.arrivals[0]
    linear = match_linear(end.node)
    if not isinstance(linear, Linear) or end.slot != linear.input_slot:
        return f"the attention output feeds {label(end.node)}, not a linear"
    index = end.layout.index(linear.channel_axis)
    columns = None if index is None else end.layout.columns(index)
    if columns is None or len(columns) != linear.in_channels:
        return f"the channels in front of {label(end.node)} cannot be followed"
    return linear, columns


def trace_values(layout: Layout, values: Values[ir.Node]) -> tuple[Layout, Trace]:
    """The layout of P V, and where its channels go, for V laid out as `layout` in front of it."""
    behind = _product_layout(layout, values)
    return behind, trace(values.matmul.outputs[0], behind, scaling=True)


def _product_layout(layout: Layout, values: Values[ir.Node]) -> Layout:
    """P V: the batch and channel axes of V stay, its key axis becomes the query axis; size-1 batch axes are broadcast."""
    sizes = dims(values.matmul.outputs[0])
    if sizes is not None and len(sizes) > len(layout.axes):
        layout = replace(layout, axes=((),) * (len(sizes) - len(layout.axes)) + layout.axes)
    count = len(layout.axes)
    keys = count - 2 if values.slot else count - 1
    axes = [axis if axis or i >= count - 2 or not sizes else token(sizes[i]) for i, axis in enumerate(layout.axes)]
    axes[keys] = token(sizes[keys] if sizes else None)
    return replace(layout, axes=tuple(axes))
