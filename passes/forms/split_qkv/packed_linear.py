"""A packed projection in three parts joined again: for layouts that split-qkv cannot take apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, new_node, replace_value
from qcompile.ir.notes import copy_notes
from qcompile.ir.ops import const_array
from qcompile.pipeline.base import PassContext
from qcompile.structure import Attention, Linear, find_attentions

_PARTS = 3


def join_thirds(graph: ir.Graph, ctx: PassContext) -> int:
    """Linear(x, W[C, 3C]) becomes Concat(Linear(x, W_q), Linear(x, W_k), Linear(x, W_v)); returns how many."""
    packed = {id(a.q.linear.node): a.q.linear for a in find_attentions(graph) if a.packed and _in_thirds(a)}
    for linear in packed.values():
        _split(graph, linear)
        ctx.remarks.applied(str(linear.node.name), "packed qkv projection split into three and joined")
    return len(packed)


def _in_thirds(attention: Attention) -> bool:
    """Whether q, k and v are the first, second and last third of the columns."""
    linear = attention.q.linear
    if linear.kind == "conv" or linear.out_channels % _PARTS or (linear.bias is not None and const_array(linear.bias) is None):
        return False
    thirds = np.split(np.arange(linear.out_channels), _PARTS)
    parts = (attention.q, attention.k, attention.v)
    return all(p.columns is not None and np.array_equal(np.unique(p.columns), t) for p, t in zip(parts, thirds, strict=True))


def _split(graph: ir.Graph, linear: Linear) -> None:
    weight, bias = const_array(linear.weight), const_array(linear.bias)
    assert weight is not None
    weights = np.split(weight, _PARTS, axis=linear.out_axis)
    biases = [None] * _PARTS if bias is None else np.split(bias.reshape(-1), _PARTS)
    nodes = [n for part, w, b in zip("qkv", weights, biases, strict=True) for n in _part(graph, linear, part, w, b)]
    ends = [n.outputs[0] for n in nodes if n.op_type == "Add" or (n.op_type == linear.node.op_type and not _biased(linear))]
    concat = new_node(graph, "Concat", ends, name=f"{linear.node.name}_join", like=linear.output, attributes={"axis": -1})
    graph.insert_after(linear.bias_node or linear.node, [*nodes, concat])
    replace_value(graph, linear.output, concat.outputs[0])


def _biased(linear: Linear) -> bool:
    """Whether a separate Add holds the bias."""
    return linear.kind == "matmul" and linear.bias is not None


def _part(graph: ir.Graph, linear: Linear, part: str, weight: np.ndarray, bias: np.ndarray | None) -> list[ir.Node]:
    stem = f"{linear.node.name}_{part}"
    constants = [linear.input, add_constant(graph, f"{stem}_weight", weight)]
    if bias is not None and not _biased(linear):
        constants.append(add_constant(graph, f"{stem}_bias", bias))
    attributes = {a.name: a.value for a in linear.node.attributes.values()}
    nodes = [new_node(graph, linear.node.op_type, constants, name=stem, attributes=attributes)]
    copy_notes(linear.node, nodes[0])
    if bias is not None and _biased(linear):
        nodes.append(
            new_node(graph, "Add", [nodes[0].outputs[0], add_constant(graph, f"{stem}_bias", bias)], name=f"{stem}_bias_add")
        )
    for node in nodes:
        node.outputs[0].type = linear.output.type
    return nodes
