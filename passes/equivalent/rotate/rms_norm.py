"""LayerNorm -> RMSNorm where the stream has no mean (SliceGPT, arXiv:2401.15024, section 3.2)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, drop_if_unused, new_node, replace_value
from qcompile.structure import Norm


def to_rms(graph: ir.Graph, norm: Norm) -> None:
    """x / sqrt(mean(x^2) + eps) * 1 in place of a LayerNorm of gain 1 and bias 0 over the last axis.

    The product with ones is where later folds put their scales.
    """
    x, out = norm.input, norm.output
    dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
    name = str(norm.node.name)
    eps = add_constant(graph, f"{name}_eps", np.asarray(norm.eps, dtype))
    gain = add_constant(graph, f"{name}_gain", np.ones(norm.channels or 1, dtype))
    square = new_node(graph, "Mul", [x, x], name=f"{name}_square", like=x)
    mean = _mean(graph, square.outputs[0], name)
    shifted = new_node(graph, "Add", [mean.outputs[0], eps], name=f"{name}_add_eps", like=mean.outputs[0])
    root = new_node(graph, "Sqrt", [shifted.outputs[0]], name=f"{name}_root", like=mean.outputs[0])
    ratio = new_node(graph, "Div", [x, root.outputs[0]], name=f"{name}_normalise", like=x)
    scaled = new_node(graph, "Mul", [ratio.outputs[0], gain], name=f"{name}_scale", like=x)
    last = next(n for n in reversed(norm.nodes) if out in n.outputs)
    graph.insert_before(last, [square, mean, shifted, root, ratio, scaled])
    replace_value(graph, out, scaled.outputs[0])
    _remove(graph, norm)


def _mean(graph: ir.Graph, value: ir.Value, name: str) -> ir.Node:
    """ReduceMean over the last axis; its axes are an input from opset 18 on."""
    if graph.opset_imports.get("", 0) >= 18:
        axes = add_constant(graph, f"{name}_axes", np.array([-1], np.int64))
        node = new_node(graph, "ReduceMean", [value, axes], name=f"{name}_mean", attributes={"keepdims": 1})
    else:
        node = new_node(graph, "ReduceMean", [value], name=f"{name}_mean", attributes={"axes": [-1], "keepdims": 1})
    node.outputs[0].type = value.type
    if value.shape is not None:
        node.outputs[0].shape = ir.Shape([*list(value.shape)[:-1], 1])
    return node


def _remove(graph: ir.Graph, norm: Norm) -> None:
    constants = [v for n in norm.nodes for v in n.inputs if v is not None and v.name in graph.initializers]
    graph.remove(list(norm.nodes), safe=True)
    for value in dict.fromkeys(constants):
        drop_if_unused(graph, value)
