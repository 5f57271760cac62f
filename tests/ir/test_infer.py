"""Shape inference against onnx_ir's pass, on every exporter fixture."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.ir.infer import drop_false_names, infer_shapes
from qcompile.ir.model import Model
from tests.structure import exports


def known(model: Model) -> dict[str, tuple[str, str]]:
    return {str(v.name): (str(v.type), str(v.shape)) for node in model.graph.all_nodes() for v in node.outputs}


@pytest.mark.parametrize("name", sorted(exports.INDEX))
def test_as_onnx_ir_infers(name: str) -> None:
    ours, theirs = Model(exports.load(name)), Model(exports.load(name))
    for model in (ours, theirs):
        for value in (v for node in model.graph.all_nodes() for v in node.outputs if not v.is_graph_output()):
            value.shape = None
    digest = ours.digest()
    infer_shapes(ours)
    ShapeInferencePass()(theirs.ir)
    assert known(ours) == known(theirs)
    assert ours.digest() == digest, "weights and nodes stay as they are"


def test_bodies_are_told_and_sequences_stay() -> None:
    node = helper.make_node
    then = helper.make_graph([node("Abs", ["x"], ["a"])], "t", [], [helper.make_tensor_value_info("a", T.FLOAT, None)])
    other = helper.make_graph([node("Neg", ["x"], ["b"])], "e", [], [helper.make_tensor_value_info("b", T.FLOAT, None)])
    nodes = [
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        node("SequenceConstruct", ["y", "w"], ["s"]),
        node("SequenceAt", ["s", "i"], ["z"]),
    ]
    w = numpy_helper.from_array(np.ones((2, 300), np.float32), "w")
    i = numpy_helper.from_array(np.array(0), "i")
    inputs = [helper.make_tensor_value_info("c", T.BOOL, []), helper.make_tensor_value_info("x", T.FLOAT, [2, 300])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("z", T.FLOAT, None)], [w, i])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    model = Model.from_proto(proto)
    infer_shapes(model)
    values = {str(v.name): v for n in model.graph.all_nodes() for v in n.outputs}
    assert [list(values[n].shape or ()) for n in ("a", "b", "y", "z")] == [[2, 300]] * 4
    onnx.checker.check_model(model.to_proto())
    assert model.to_proto().SerializeToString() and not values["s"].shape


def test_a_graph_that_onnx_refuses_stays() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    w = numpy_helper.from_array(np.ones((3, 5), np.float32), "w")
    ends = [helper.make_tensor_value_info("x", T.FLOAT, [2, 4]), helper.make_tensor_value_info("y", T.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [w])
    model = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    infer_shapes(model)
    assert model.graph.outputs[0].shape is None


def test_the_reader_of_a_plugins_output_tells_its_type() -> None:
    nodes = [
        helper.make_node("Magic", ["x"], ["a", "b"], domain="plugin"),
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Gather", ["m", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, T.FLOAT, ["N", 16]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.ones((16, 16), np.float32), "w")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("plugin", 1)]
    model = Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    infer_shapes(model)
    found = {str(v.name): v for n in model.graph for v in n.outputs}
    assert found["a"].dtype == found["m"].dtype == ir.DataType.FLOAT
    assert found["b"].type is None  # one of two integer types


def test_a_name_that_the_data_contradicts_is_dropped() -> None:
    values = [
        helper.make_tensor_value_info("x", T.FLOAT, ["N", 3, "?", "?"]),
        helper.make_tensor_value_info("m", T.FLOAT, ["N", 4]),
    ]
    outs = [
        helper.make_tensor_value_info("y", T.FLOAT, ["N", 3, "?", "?"]),
        helper.make_tensor_value_info("z", T.FLOAT, ["N", 4]),
    ]
    nodes = [helper.make_node("Abs", ["x"], ["y"]), helper.make_node("Abs", ["m"], ["z"])]
    model = Model.from_proto(helper.make_model(helper.make_graph(nodes, "g", values, outs)))
    batch = {"m": {"min": [1, 4], "max": [8, 4]}}
    assert not drop_false_names(model, batch | {"x": {"min": [1, 3, 48, 48], "max": [8, 3, 96, 96]}})
    (line,) = drop_false_names(model, batch | {"x": {"min": [1, 3, 48, 192], "max": [8, 3, 48, 192]}})
    assert "'?'" in line
    graph = model.to_proto().graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims == [["N", 3, 0, 0], ["N", 4], ["N", 3, 0, 0], ["N", 4]]
