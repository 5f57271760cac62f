"""Inference keeps sequences and optional values what they are, and finds types that only readers tell."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model

node = helper.make_node
T = onnx.TensorProto


def inferred(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> dict[str, ir.Value]:
    x, y = (helper.make_tensor_value_info(n, T.FLOAT, ["N", 16]) for n in "xy")
    arrays = [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], arrays)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("plugin", 1)]
    model = Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    infer_shapes(model.ir)
    return {str(v.name): v for n in model.graph for v in n.outputs}


def test_sequences_and_optional_values_are_no_tensors() -> None:
    nodes = [
        node("SplitToSequence", ["x"], ["parts"], axis=0),
        node("Identity", ["parts"], ["same"]),
        node("Optional", ["same"], ["maybe"]),
        node("OptionalGetElement", ["maybe"], ["there"]),
        node("ConcatFromSequence", ["same"], ["y"], axis=0),
    ]
    found = inferred(nodes, {})
    assert isinstance(found["parts"].type, ir.SequenceType) and isinstance(found["same"].type, ir.SequenceType)
    assert isinstance(found["maybe"].type, ir.OptionalType)
    assert found["y"].type == ir.TensorType(ir.DataType.FLOAT)


def test_the_reader_of_a_plugins_output_tells_its_type() -> None:
    nodes = [
        node("Magic", ["x"], ["a", "b"], domain="plugin"),
        node("MatMul", ["a", "w"], ["m"]),
        node("Gather", ["m", "b"], ["y"]),
    ]
    found = inferred(nodes, {"w": np.ones((16, 16), np.float32)})
    assert found["a"].dtype == found["m"].dtype == ir.DataType.FLOAT
    assert found["b"].type is None  # one of two integer types
