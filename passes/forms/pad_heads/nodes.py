"""Zeros by Pad nodes: what works wherever q, k and v come from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, insert_after, new_node, splice_after
from qcompile.ir.shapes import rank
from qcompile.structure.scores import Values


def pad_operands(graph: ir.Graph, product: ir.Node, values: Values[ir.Node], sizes: tuple[int, int], size: int) -> None:
    """Zeros behind q (last axis), k (the one before) and v, cut again behind P V; heads that have `size` stay as they are."""
    (q, v), pv, axis = sizes, values.matmul, -1 if values.slot else -2
    if q != size:
        _pad(graph, product, 0, -1, size - q)
        _pad(graph, product, 1, -2, size - q)
    if v == size:
        return
    _pad(graph, pv, values.slot, axis, size - v)
    _cut(graph, pv.outputs[0], axis, v)


def _pad(graph: ir.Graph, node: ir.Node, slot: int, axis: int, count: int) -> None:
    value = node.inputs[slot]
    axes = rank(value)
    assert value is not None and axes is not None
    amounts = np.zeros(2 * axes, np.int64)
    amounts[axis] = count
    if axis == -2:
        amounts[-1] = 0
    pad = new_node(graph, "Pad", [value, add_constant(graph, f"{node.name}_zeros", amounts)], name=f"{value.name}_padded")
    pad.outputs[0].type = value.type
    insert_after(graph, value, pad)
    node.replace_input_with(slot, pad.outputs[0])


def _cut(graph: ir.Graph, value: ir.Value, axis: int, size: int) -> None:
    """The first `size` elements go on, under the tensor's name."""
    name, bounds = value.name, [add_constant(graph, f"{value.name}_{n}", np.array([i], np.int64)) for n, i in _bounds(axis, size)]
    cut = new_node(graph, "Slice", [value, *bounds], name=f"{name}_cut", like=value)
    value.shape = None
    splice_after(graph, value, cut)
    if not cut.outputs[0].is_graph_output():
        swapped = cut.outputs[0].name
        value.name, cut.outputs[0].name = f"{swapped}_wide", name


def _bounds(axis: int, size: int) -> tuple[tuple[str, int], ...]:
    return ("from", 0), ("to", size), ("axis", axis)
