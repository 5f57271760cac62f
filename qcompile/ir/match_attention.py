"""Softmax attention: projections, scores, scale, mask, softmax, P V and the output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir import ops
from qcompile.ir.match_core import Matches, Refusal, label
from qcompile.ir.match_heads import Projection, head_columns
from qcompile.ir.match_linear import Linear, linears_by_output, match_linear
from qcompile.ir.match_shape import rank
from qcompile.ir.match_source import Source, find_source
from qcompile.ir.match_trace import Trace, is_scaling, start_layout, trace

Part = Literal["q", "k", "v"]
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_SCORE_OPS = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Clip", "Max", "Min", "Tanh", "Squeeze"})
_PROBABILITY_OPS = frozenset({"Identity", "Dropout", "Cast", "Reshape", "Transpose", "Mul", "Div", "Where", "Clip", "Add"})
_MAX_WALK = 16


@dataclass(frozen=True)
class Attention:
    """softmax(scale * q k^T + mask) v, between its projections.

    `q`, `k`, `v` share one linear when the projection is packed (`packed`).  `out` is the output projection and `out_columns[i]`
    the output channel of `v.linear` that becomes its input channel i; both are None when the output does not go to one linear.
    `scales` are the Mul / Div nodes by one number on q, k or the scores, `masks` the nodes that add to (or select from) them.
    """

    q: Projection
    k: Projection
    v: Projection
    scores: ir.Node
    scales: tuple[ir.Node, ...]
    masks: tuple[ir.Node, ...]
    softmax: ir.Node
    pv: ir.Node
    v_slot: int
    out: Linear | None
    out_columns: NDArray[np.int64] | None
    has_rope: bool
    has_qk_norm: bool

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


def find_attentions(graph: ir.Graph) -> Matches[Attention]:
    """All attention blocks around a Softmax over the last axis; fused Attention operators are refused."""
    linears = linears_by_output(graph)
    traces: dict[Linear, Trace | None] = {}
    found: list[Attention] = []
    refused: list[Refusal] = []
    for node in graph:
        if node.op_type in _FUSED:
            refused.append(Refusal(node, f"fused {node.op_type} operator: decompose it first (run canonicalize)"))
        if not ops.is_op(node, "Softmax"):
            continue
        match = _Matcher(node, linears, traces).match()
        if isinstance(match, Attention):
            found.append(match)
        elif match is not None:
            refused.append(match)
    return Matches(tuple(found), tuple(refused))


class _Matcher:
    def __init__(self, softmax: ir.Node, linears: dict[ir.Value, Linear], traces: dict[Linear, Trace | None]) -> None:
        self.softmax, self.linears, self.traces = softmax, linears, traces

    def match(self) -> Attention | Refusal | None:
        walk = _find_scores(self.softmax)
        if walk is None:
            return None
        scores, between = walk
        if not _over_last_axis(self.softmax):
            return Refusal(self.softmax, "softmax is not over the last axis")
        found = _find_pv(self.softmax)
        if found is None:
            return Refusal(self.softmax, "its probabilities do not go to one MatMul with computed values")
        pv, slot = found
        sources = [self._source(v) for v in (scores.inputs[0], scores.inputs[1], pv.inputs[1 - slot])]
        missing = [name for name, source in zip("qkv", sources, strict=True) if source is None]
        if missing:
            return Refusal(self.softmax, f"{' and '.join(missing)} does not come from a linear")
        q, k, v = (source for source in sources if source is not None)
        return self._attention(scores, between, pv, 1 - slot, (q, k, v))

    def _source(self, value: ir.Value | None) -> Source | None:
        return None if value is None else find_source(value, self.linears)

    def _attention(
        self, scores: ir.Node, between: list[ir.Node], pv: ir.Node, v_slot: int, sources: tuple[Source, Source, Source]
    ) -> Attention:
        q, k, v = sources
        out = self._output(v, pv, v_slot)
        scaling = [n for s in (q, k) for n in s.scales] + [n for n in between if _scales(n)]
        return Attention(
            q=self._projection(q, scores, 0, -1),
            k=self._projection(k, scores, 1, -2),
            v=self._projection(v, pv, v_slot, -1 if v_slot else -2),
            scores=scores,
            scales=tuple(dict.fromkeys(scaling)),
            masks=tuple(n for n in between if ops.is_op(n, "Add", "Sub", "Where")),
            softmax=self.softmax,
            pv=pv,
            v_slot=v_slot,
            out=None if out is None else out[0],
            out_columns=None if out is None else out[1],
            has_rope=q.rope or k.rope,
            has_qk_norm=q.norm or k.norm,
        )

    def trace_of(self, linear: Linear) -> Trace | None:
        if linear not in self.traces:
            self.traces[linear] = trace_linear(linear)
        return self.traces[linear]

    def _projection(self, source: Source, node: ir.Node, slot: int, axis: int) -> Projection:
        traced = self.trace_of(source.linear)
        layouts = [a.layout for a in traced.arrivals if a.node is node and a.slot == slot] if traced is not None else []
        return Projection(source.linear, head_columns(layouts[0], axis) if layouts else None)

    def _output(self, v: Source, pv: ir.Node, v_slot: int) -> tuple[Linear, NDArray[np.int64]] | None:
        traced = self.trace_of(v.linear)
        ends = [] if traced is None else [a for a in traced.arrivals if a.node is pv and a.slot == v_slot]
        return follow_pv(ends[0].layout, pv) if len(ends) == 1 else None


def trace_linear(linear: Linear) -> Trace | None:
    """Where the output channels of a linear go, through movement and scaling by one number; None if its rank is needed but unknown."""
    layout = start_layout(linear.output, linear.out_channels, linear.channel_axis)
    return None if layout is None else trace(linear.output, layout, scaling=True)


def follow_pv(layout: object, pv: ir.Node) -> tuple[Linear, NDArray[np.int64]] | None:
    """placeholder"""
    raise NotImplementedError


def _over_last_axis(softmax: ir.Node) -> bool:
    axis, known = ops.int_attr(softmax, "axis", -1), rank(softmax.inputs[0])
    return axis == -1 or (known is not None and axis == known - 1)


def _scales(node: ir.Node) -> bool:
    return is_scaling(node, 0) or (ops.is_op(node, "Mul") and is_scaling(node, 1))


def _find_scores(softmax: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """The MatMul of two computed values behind the softmax's input, and the nodes between, nearest to the MatMul first."""
    raise NotImplementedError


def _find_pv(softmax: ir.Node) -> tuple[ir.Node, int] | None:
    raise NotImplementedError


def _unused() -> Iterator[object]:
    yield match_linear
    yield label
