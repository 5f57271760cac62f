"""Attention (opset 23) as MatMul, Softmax, MatMul, so that its parts can be seen and quantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, new_node, replace_value
from qcompile.pipeline.base import PassContext


def decompose_attention(graph: ir.Graph, node: ir.Node, ctx: PassContext) -> None:
    """softmax(scale Q K^T + mask) V for 4-D Q, K, V with equal heads (ONNX operator Attention-23).

    Refused with a remark: 3-D inputs, grouped heads, past/present caches, causal or softcap forms.
    """
    reason = _refusal(node)
    if reason:
        ctx.remarks.missed(str(node.name), f"Attention kept: {reason}")
        return
    q, k, v = node.inputs[0], node.inputs[1], node.inputs[2]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    assert q is not None and k is not None and v is not None and q.shape is not None
    chain = _Chain(graph, node)
    root = np.sqrt(_scale(node, q))
    dtype = q.dtype.numpy() if q.dtype is not None else np.dtype(np.float32)
    factor = add_constant(graph, f"{node.name}_scale", np.array(root, dtype))
    kt = chain.add("Transpose", [k], "kt", attributes={"perm": [0, 1, 3, 2]})
    scores = chain.add("MatMul", [chain.add("Mul", [q, factor], "q"), chain.add("Mul", [kt, factor], "k")], "scores")
    if mask is not None:
        scores = chain.add("Add", [scores, mask], "mask")
    p = chain.add("Softmax", [scores], "softmax", attributes={"axis": -1})
    out = chain.add("MatMul", [p, v], "pv", like=node.outputs[0])
    replace_value(graph, node.outputs[0], out)
    graph.remove(node, safe=True)
    ctx.remarks.applied(str(node.name), "Attention decomposed into MatMul, Softmax, MatMul")


class _Chain:
    """Appends nodes behind each other, named after the node that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def add(
        self, op: str, inputs: list[ir.Value | None], suffix: str, like: ir.Value | None = None, attributes: dict | None = None
    ) -> ir.Value:
        made = new_node(self.graph, op, inputs, name=f"{self.node.name}_{suffix}", like=like, attributes=attributes)
        self.graph.insert_before(self.node, made)
        if like is None and self.node.inputs[0] is not None:
            made.outputs[0].type = self.node.inputs[0].type
        return made.outputs[0]


def _scale(node: ir.Node, q: ir.Value) -> float:
    if "scale" in node.attributes:
        return float(node.attributes["scale"].as_float())
    assert q.shape is not None
    size = q.shape[-1]
    assert isinstance(size, int)
    return 1.0 / float(np.sqrt(size))


def _refusal(node: ir.Node) -> str | None:
    q, k, v = node.inputs[0], node.inputs[1], node.inputs[2]
    shapes = [x.shape for x in (q, k, v) if x is not None]
    if len(shapes) < 3 or any(s is None or len(s) != 4 for s in shapes):
        return "its inputs are not known to be 4-D"
    if q.shape[1] != k.shape[1]:  # type: ignore[union-attr,index]
        return "query and key heads differ (grouped-query form)"
    if not isinstance(shapes[0][-1], int) and "scale" not in node.attributes:  # type: ignore[index]
        return "the head size is not static"
    if len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1 or len(node.inputs) > 4:
        return "it keeps a cache of keys and values"
    flags = {
        name: node.attributes[name].value for name in ("is_causal", "softcap", "qk_matmul_output_mode") if name in node.attributes
    }
    return f"{next(n for n, f in flags.items() if f)} is set" if any(flags.values()) else None
