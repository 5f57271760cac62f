"""The heads of a network: nothing follows to hide their rounding."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import is_const, is_data_movement, is_op, weight_slot
from qcompile.ir.optable import ops_with
from qcompile.structure.core import data_uses

_UNARY = ops_with("unary") | {"ArgMax", "Cast", "Clip", "LogSoftmax", "Softmax"}


def final_heads(graph: ir.Graph) -> frozenset[ir.Node]:
    """Weighted layers that reach graph outputs through elementwise and reshaping operators alone; none if no other is left."""
    weighted = [n for n in graph if weight_slot(n) is not None]
    heads = frozenset(n for n in weighted if _ends_outside(n.outputs[0]))
    return frozenset() if len(heads) == len(weighted) else heads


def _ends_outside(value: ir.Value) -> bool:
    stack, seen = [value], set[ir.Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        uses = data_uses(value)
        if not (uses or value.is_graph_output()) or not all(_passes_on(node, slot) for node, slot in uses):
            return False
        stack.extend(out for node, _ in uses for out in node.outputs)
    return True


def _passes_on(node: ir.Node, slot: int) -> bool:
    """Elementwise with constants or graph inputs only (a sum with another branch is a residual stream), or data movement."""
    if is_data_movement(node) or is_op(node, *_UNARY):
        return slot == 0 or is_op(node, "Concat")
    others = [v for i, v in enumerate(node.inputs) if i != slot and v is not None]
    return is_op(node, *ops_with("arithmetic")) and all(is_const(v) or v.producer() is None for v in others)
