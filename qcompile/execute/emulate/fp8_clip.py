"""Relu and Clip in front of FP8 codes, which ONNX Runtime 1.31 takes for integers at full optimization.

Relu is dropped as if FP8 had no negative numbers; with Clip the model does not load ("Unexpected data type for
QuantizeLinear input y_zero_point of 17").  Max and Min are left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.execute.emulate.build import FLOAT, Lines
from qcompile.ir.ops import input_at, int_attr, is_op

_FP8 = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})


def keep_clips(graph: ir.Graph) -> bool:
    """Relu(x), Clip(x, a, b) -> QuantizeLinear to FP8 becomes Max(x, 0), Min(Max(x, a), b); whether there was one."""
    found = [n for n in graph if is_op(n, "Relu", "Clip") and any(_to_fp8(user) for user, _ in n.outputs[0].uses())]
    for node in found:
        _rewrite(graph, node)
    return bool(found)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, line = node.inputs[0], Lines(graph, node)
    assert x is not None
    dtype = x.dtype or FLOAT
    low, high = (line.cast(line.number(0), dtype), None) if node.op_type == "Relu" else (input_at(node, 1), input_at(node, 2))
    for op, bound in (("Max", low), ("Min", high)):
        x = x if bound is None else line(op, x, bound, dtype=dtype)
    line.finish(x)


def _to_fp8(node: ir.Node) -> bool:
    if not is_op(node, "QuantizeLinear"):
        return False
    zero = input_at(node, 2)
    return (zero.dtype if zero is not None else int_attr(node, "output_dtype", 0)) in _FP8
