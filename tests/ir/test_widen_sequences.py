"""Sequences of 16-bit floats at the interface keep their type while the rest is computed in float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.ir.model import Model
from qcompile.ir.widen import widen

F16 = TensorProto.FLOAT16
node = helper.make_node


def model(nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info("x", F16, [2, 4])]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float16), "w"), numpy_helper.from_array(np.array(0), "first")]
    graph = helper.make_graph(nodes, "g", given, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sequence(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, F16, None)


def tensor(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, F16, [2, 4])


CONSTRUCT = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("SequenceConstruct", ["a", "b"], ["s"])]
AT = node("SequenceAt", ["s", "first"], ["t"])
BRANCH = helper.make_graph([AT], "then", [], [tensor("t")])
OTHER = helper.make_graph([node("Identity", ["b"], ["e"])], "else", [], [tensor("e")])
IF = [node("ReduceSum", ["b"], ["n"], keepdims=0), node("Cast", ["n"], ["c"], to=TensorProto.BOOL)]
IF.append(node("If", ["c"], ["u"], then_branch=BRANCH, else_branch=OTHER))


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (CONSTRUCT, [sequence("s")]),
        ([*CONSTRUCT, AT, node("Relu", ["t"], ["y"])], [tensor("y"), sequence("s")]),
        ([*CONSTRUCT, *IF, node("MatMul", ["u", "w"], ["y"])], [tensor("y"), sequence("s")]),
    ],
)
def test_sequences_of_the_interface_keep_their_type(nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto]) -> None:
    proto = model(nodes, outputs)
    made = Model.from_proto(proto)
    assert widen(made)
    types = [(v.name, v.type) for v in made.graph.outputs]
    assert types == [(v.name, v.type) for v in Model.from_proto(proto).graph.outputs]
    product = next(n for n in made.graph if n.op_type == "MatMul")
    assert product.outputs[0].dtype == ir.DataType.FLOAT
    onnx.checker.check_model(made.to_proto(), full_check=True)
