"""fold-bn: BatchNormalization into the layer in front of it, or into the layers behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import erase_dead, replace_value, set_constant
from qcompile.ir.model import Model
from qcompile.ir.notes import ChannelStats, set_channel_stats
from qcompile.ir.ops import CONV_OPS, const_array, float_attr, int_attr, is_op, pads_zeros, weight_slot
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.rewrite.bias import bias_at, bias_site, by_input, by_output, mean_output, set_bias, shift_bias, weight_array
from qcompile.rewrite.linear import absorb_shift, add_to_bias, fresh, scale_inputs, scale_outputs
from qcompile.structure import Linear, find_linears, match_linear
from qcompile.structure.channels.layout import Layout
from qcompile.structure.channels.trace import Arrival, start_layout, trace
from qcompile.structure.core import label, names_between

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the layer that feeds it, or else into the layers that read it.

    before: Conv(x, W, c) -> BatchNormalization(gamma, beta, mu, v)
    after:  Conv(x, W * f, (c - mu) * f + beta),  f = gamma / sqrt(v + eps)   (Jacob et al. 2018, section 3.2)
    before: BatchNormalization(x) -> Conv(W, c)
    after:  Conv(x, W * f, c + sum W h),  h = beta - mu f
    In front: Conv, ConvTranspose, Gemm, and MatMul with data movement up to the BatchNormalization.  Behind: Conv, Gemm and
    MatMul; a Conv that pads with zeros only where h = 0, since its border would need -h / f.
    Exact in float on every target, without a new node.  beta and |gamma|, the mean and deviation of what it made, stay in the
    node's metadata for bias-correct{mode=bn} and absorb-bias.
    Refuses a layer whose output has another reader, training mode, and parameters that are not constant.
    """

    name = "fold-bn"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Fold every legal site; see the class."""
        norms = [node for node in model.graph if is_op(node, "BatchNormalization")]
        linears = _in_front(model.graph) if norms else {}
        changed: set[str] = set()
        done = [_fold(model.graph, bn, linears.get(bn), ctx, changed) for bn in norms]
        erase_dead(model)
        return PassResult(any(done), Changes(moved=changed))


@dataclass(frozen=True, eq=False)
class _Affine:
    """The normalization as x f + h in each channel; what it makes has mean and deviation `stats`."""

    f: F64
    h: F64
    stats: ChannelStats


def _fold(graph: ir.Graph, bn: ir.Node, linear: Linear | None, ctx: PassContext, changed: set[str]) -> bool:
    affine = _affine(bn)
    if isinstance(affine, str):
        ctx.remarks.missed(str(bn.name), affine)
        return False
    front = linear or _conv_in_front(bn)
    if not isinstance(front, str):
        node = _into_front(graph, front, affine)
        changed |= set(names_between([node], bn))
        ctx.remarks.applied(str(bn.name), f"folded into {node.name}")
    else:
        readers = _readers(bn, affine)
        if isinstance(readers, str):
            ctx.remarks.missed(str(bn.name), f"{front}; {readers}")
            return False
        for reader in readers:
            _into_reader(graph, reader, affine)
        ctx.remarks.applied(str(bn.name), f"folded into {', '.join(str(r.node.name) for r in readers)} behind it")
    x = bn.inputs[0]
    assert x is not None
    replace_value(graph, bn.outputs[0], x)
    return True


def _affine(bn: ir.Node) -> _Affine | str:
    """The normalization, or why it is not a constant map of each channel."""
    if int_attr(bn, "training_mode", 0) or any(o.uses() for o in bn.outputs[1:]):
        return "it is in training mode"
    arrays = [const_array(v) for v in bn.inputs[1:5]]
    found = [a.astype(np.float64) for a in arrays if a is not None]
    if len(found) < 4:
        return "its parameters are not constant"
    gamma, beta, mean, var = found
    f = gamma / np.sqrt(var + float_attr(bn, "epsilon", 1e-5))
    return _Affine(f, beta - mean * f, ChannelStats(beta, np.abs(gamma)))


# ---- the layer in front -----------------------------------------------------------------------------------------------


def _in_front(graph: ir.Graph) -> dict[ir.Node, Linear]:
    """MatMul and Gemm layers whose output reaches one BatchNormalization, as its channels, and nothing else."""
    found: dict[ir.Node, Linear] = {}
    for linear in find_linears(graph):
        layout = start_layout(linear.output, linear.out_channels) if linear.kind != "conv" else None
        if layout is None:
            continue
        traced = trace(linear.output, layout)
        ends = traced.arrivals
        alone = len(ends) == 1 and not (traced.lost or traced.outputs or traced.filled)
        if alone and is_op(ends[0].node, "BatchNormalization") and _in_order(ends[0].layout, linear.out_channels):
            found[ends[0].node] = linear
    return found


def _in_order(layout: Layout, channels: int) -> bool:
    """Whether axis 1 holds all channels in their order."""
    columns = _columns(layout, 1)
    return columns is not None and np.array_equal(columns, np.arange(channels))


def _columns(layout: Layout, axis: int) -> NDArray[np.int64] | None:
    index = layout.index(axis)
    return None if index is None else layout.columns(index)


def _conv_in_front(bn: ir.Node) -> ir.Node | str:
    """The convolution that `bn` alone reads, or why there is none."""
    conv = bn.inputs[0].producer() if bn.inputs[0] is not None else None
    if conv is None or not is_op(conv, *CONV_OPS) or weight_slot(conv) is None:
        return "no layer with a constant weight feeds it alone"
    if len(conv.outputs[0].uses()) != 1 or conv.outputs[0].is_graph_output():
        return f"the output of {conv.name} has another reader"
    return f"the bias of {conv.name} is not constant" if bias_site(conv) is None else conv


def _into_front(graph: ir.Graph, front: Linear | ir.Node, affine: _Affine) -> ir.Node:
    """(x W + c) f + h = x (W f) + (c f + h); returns the layer's node."""
    if isinstance(front, Linear):
        scale_outputs(front, affine.f)
        add_to_bias(graph, fresh(front), affine.h)
        set_channel_stats(fresh(front).output, affine.stats)
        return front.node
    set_constant(front, 1, weight_array(front) * by_output(front, affine.f))
    set_bias(graph, (front, 2), bias_at((front, 2), affine.f.size) * affine.f + affine.h)
    set_channel_stats(front.outputs[0], affine.stats)
    return front


# ---- the layers behind ------------------------------------------------------------------------------------------------


def _readers(bn: ir.Node, affine: _Affine) -> list[Arrival] | str:
    """The layers that read the normalized channels, all of which can take the fold, or why there are none."""
    layout = start_layout(bn.outputs[0], affine.f.size, 1)
    if layout is None:
        return "its rank is unknown: run canonicalize"
    traced = trace(bn.outputs[0], layout)
    if traced.outputs:
        return f"{traced.outputs[0][0].name} is a graph output"
    if traced.lost or traced.filled:
        return traced.lost[0].reason if traced.lost else f"{label(traced.filled[0])} writes a constant between its values"
    reasons = (_reader_refusal(a, affine) for a in traced.arrivals)
    return next((r for r in reasons if r), None) or list(traced.arrivals)


def _reader_refusal(arrival: Arrival, affine: _Affine) -> str | None:
    node = arrival.node
    if is_op(node, "Conv") and weight_slot(node) == 1 and arrival.slot == 0:
        if bias_site(node) is None or not _in_order(arrival.layout, affine.f.size):
            return f"{label(node)} behind it has no constant bias, or reads its channels in another order"
        return (
            f"{label(node)} behind it pads with zeros, and its border would need -h / f"
            if pads_zeros(node) and affine.h.any()
            else None
        )
    linear = match_linear(node)
    if not isinstance(linear, Linear) or linear.input_slot != arrival.slot:
        return f"{label(node)} behind it is no layer with a constant weight"
    columns = _columns(arrival.layout, -1)
    return (
        None if columns is not None and len(columns) == linear.in_channels else f"its channels are lost in front of {label(node)}"
    )


def _into_reader(graph: ir.Graph, reader: Arrival, affine: _Affine) -> None:
    """(x f + h) W + c = x diag(f) W + (c + h W)."""
    if is_op(reader.node, "Conv"):
        node, weight = reader.node, weight_array(reader.node)
        shift = mean_output(node, weight, affine.h)
        assert shift is not None
        shift_bias(graph, (node, 2), shift)
        set_constant(node, 1, weight * by_input(node, affine.f))
        return
    linear, columns = match_linear(reader.node), _columns(reader.layout, -1)
    assert isinstance(linear, Linear) and columns is not None
    absorb_shift(graph, linear, affine.h[columns])
    scale_inputs(linear, affine.f[columns])
