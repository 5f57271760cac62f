"""Work that no placement looks at, and that stays in float: it is said, or a model of nothing else would pass in silence."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.ops import bodies, is_compute, is_op
from qcompile.ir.optable import SCALED_AT_RUN_TIME, ops_with
from qcompile.target.platform import Platform

_RECURRENT = ops_with("recurrent")


def miss_unplaced(out: Placement, graph: ir.Graph, target: Platform) -> None:
    """A remark at each recurrent layer, at each If, Loop or Scan whose bodies multiply matrices, and at each layer in a quantized
    form that stays."""
    for node in graph:
        inner = [n for body in bodies(node) for n in body.all_nodes() if is_compute(n) or is_op(n, *_RECURRENT)]
        if is_op(node, *_RECURRENT):
            out.miss(node, _recurrent(node, target))
        elif node.op_type in SCALED_AT_RUN_TIME:
            out.miss(node, f"{node.op_type} is a quantized form that stays as it is")
        elif inner:
            out.miss(node, f"bodies of {node.op_type} are not quantized: its {len(inner)} products stay in float")


def _recurrent(node: ir.Node, target: Platform) -> str:
    if is_op(node, "LSTM") and target.dynamic_lstm:
        return "a recurrent layer: float, unless insert-qdq{lstm=dynamic} as the last pass has it in 8 bit, ranges of run time"
    return f"a recurrent layer: {target.name} has no low-precision kernel for {node.op_type}, so it stays in float"
