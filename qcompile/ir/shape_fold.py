"""Fold integer vectors that exporters compute from known dimensions: Reshape targets, pads, slice bounds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.edit import add_constant
from qcompile.ir.match_shape import int_vector, rank

_VECTOR_SLOTS = {"Expand": (1,), "Pad": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "Unsqueeze": (1,)}


def fold_shapes(graph: ir.Graph) -> int:
    """Replace computed integer vectors whose every element is known by constants; returns how many.

    Infer shapes and call again until it returns 0: each round may make more dimensions known.
    """
    sites = [(node, slot) for node in graph for slot in _VECTOR_SLOTS.get(node.op_type, ()) if not node.domain]
    return sum(_fold(graph, node, slot) for node, slot in sites)


def _fold(graph: ir.Graph, node: ir.Node, slot: int) -> bool:
    value = ops.input_at(node, slot)
    if value is None or ops.is_const(value) or rank(value) != 1:
        return False
    vector = int_vector(value)
    if vector is None or value.dtype not in (None, ir.DataType.INT64):
        return False
    node.replace_input_with(slot, add_constant(graph, f"{value.name}_folded", np.array(vector, dtype=np.int64)))
    return True
