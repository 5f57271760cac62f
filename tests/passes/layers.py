"""Quantized layers one by one: the error of each on its float input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.decisions import decision, decisions
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.rewrite.bias import bias_site
from tests.passes.measures import outputs


def layers(model: Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes with a quantized constant weight."""
    for node, slot, d in decisions(model.graph):
        if (
            slot == 1
            and is_op(node, "MatMul", "Gemm", "Conv")
            and const_array(node.inputs[slot]) is not None
            and d.qparams is not None
        ):
            yield node, slot


def layer_output(node: ir.Node, x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """The layer alone, its bias included, on the float input `x`."""
    alone = ir.Node(
        "", node.op_type, [ir.Value(name="x"), ir.Value(name="w")], node.attributes.values(), num_outputs=1, name="alone"
    )
    alone.outputs[0].name = "y"
    graph = ir.Graph(alone.inputs, alone.outputs, nodes=[alone], opset_imports={"": 19})
    for value, array in zip(alone.inputs, (x, weight), strict=True):
        assert value is not None
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
    alone.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    y = make_session(proto.SerializeToString(), optimize="off", threads=1).run(None, {"x": x, "w": weight.astype(np.float32)})[0]
    return np.asarray(y, np.float64) + bias_of(node, y.ndim)


def bias_of(node: ir.Node, rank: int) -> NDArray[np.float64]:
    site = bias_site(node)
    bias = const_array(site[0].inputs[site[1]]) if site is not None and site[1] < len(site[0].inputs) else None
    if bias is None:
        return np.zeros(())
    flat = bias.astype(np.float64).reshape(-1)
    return flat.reshape([-1 if i == 1 else 1 for i in range(rank)]) if node.op_type == "Conv" else flat


def layer_errors(model: Model, source: Model, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Squared output error of each quantized layer, for the float input of `source`."""
    originals = {n.name: n for n in source.graph}
    found: dict[str, float] = {}
    for node, slot in layers(model):
        original, weight = originals[node.name], const_array(node.inputs[slot])
        decided = decision(node, slot)
        x, true = activation(source, original, arrays), const_array(original.inputs[slot])
        assert weight is not None and true is not None and decided is not None
        rounded = decided.rounded(weight.astype(np.float32))
        found[str(node.name)] = float(np.square(layer_output(node, x, rounded) - layer_output(original, x, true)).sum())
    return found


def activation(source: Model, node: ir.Node, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    value = node.inputs[0]
    assert value is not None
    if value.name in arrays:
        return arrays[str(value.name)]
    exposed = source.clone()
    wanted = next(v for n in exposed.graph for v in n.outputs if v.name == value.name)
    exposed.graph.outputs.clear()
    exposed.graph.outputs.append(wanted)
    return outputs(exposed, arrays)[0]
