"""Layers that a placement leaves in float since their rounding is seen: heads, and spectra in front of a logarithm."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import is_op, weight_slot
from qcompile.ir.optable import ops_with
from qcompile.structure.core import data_uses
from qcompile.target.heads import final_heads

HEAD = "a head: nothing follows to hide its rounding, and it is a small part of the work"
SPECTRUM = "a logarithm follows, which makes the rounding of small values as large as they are"
_POWERS = ops_with("movement") | {
    "Abs", "Add", "Cast", "Clip", "Div", "Max", "Mul", "Neg", "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare",
    "Sqrt", "Sub", "Sum",
}  # fmt: skip


def sensitive(graph: ir.Graph) -> dict[ir.Node, str]:
    """Why each such layer is kept."""
    return dict.fromkeys(final_heads(graph), HEAD) | dict.fromkeys(log_spectra(graph), SPECTRUM)


def log_spectra(graph: ir.Graph) -> frozenset[ir.Node]:
    """Weighted layers from which linear operators, squares, sums and roots alone lead to a logarithm: the filters and the mel
    bands of sound, whose quiet parts a scale for the loud ones rounds to nothing."""
    leading = set[ir.Node]()
    for node in reversed(graph):
        if weight_slot(node) is None and not is_op(node, *_POWERS):
            continue
        if any(user in leading or is_op(user, "Log") for v in node.outputs for user, _ in data_uses(v)):
            leading.add(node)
    return frozenset(n for n in leading if weight_slot(n) is not None)
