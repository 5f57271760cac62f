"""Convolution biases that ONNX Runtime would turn into infinity.

Between a quantized Conv or Gemm and a QuantizeLinear, ONNX Runtime (1.31) replaces a float16 bias c by
round(c / (s_x s_w)) computed in float16, which overflows above 65504.  Such a bias becomes an Add behind the layer:
exact, and the same kernel in TensorRT, which applies biases in the epilogue anyway.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, insert_after, new_node, redirect, swap_output
from qcompile.ir.ops import const_array, is_op

_LIMIT = 60000.0


def free_large_biases(graph: ir.Graph) -> int:
    """Move every bias that would overflow into an Add; returns how many."""
    moved = [node for node in list(graph) if is_op(node, "Conv", "Gemm") and _overflows(node)]
    for node in moved:
        _free(graph, node)
    return len(moved)


def _overflows(node: ir.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    data, weight, bias = _scale(node.inputs[0]), _scale(node.inputs[1]), const_array(node.inputs[2])
    if data is None or weight is None or bias is None:
        return False
    return float(np.max(np.abs(bias.astype(np.float64)).max() / (data.max() * weight.min()))) > _LIMIT


def _scale(value: ir.Value | None) -> np.ndarray | None:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    scale = const_array(producer.inputs[1])
    return None if scale is None else scale.astype(np.float64)


def _free(graph: ir.Graph, node: ir.Node) -> None:
    bias, out = node.inputs[2], node.outputs[0]
    array = const_array(bias)
    assert array is not None and bias is not None
    rank = len(out.shape) if out.shape is not None else (4 if node.op_type == "Conv" else 2)
    shape = (1, -1) + (1,) * (rank - 2) if node.op_type == "Conv" else (1, -1)
    node.resize_inputs(2)
    constant = add_constant(graph, f"{bias.name}_behind", array.reshape(shape), bias.dtype)
    uses = list(out.uses())
    add = new_node(graph, "Add", [out, constant], name=f"{node.name}_bias", like=out)
    insert_after(graph, out, add)
    redirect(out, add.outputs[0], uses)
    if out.is_graph_output():
        swap_output(graph, out, add.outputs[0])
