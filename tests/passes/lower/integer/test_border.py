"""Interfaces that are not float32: the Cast of an input or output stays outside of the integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.execute.session import make_session, run
from qcompile.ir.model import Model
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.target.check import check
from tests.passes.measures import sqnr_db
from tests.passes.running import context, pipeline

TYPES = {TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
RNG = np.random.default_rng(0)


def two_layers(dtype: TensorProto.DataType, inner: bool) -> Model:
    """Two products with a Relu between; computed in `dtype`, or (`inner`) in float32 between two Casts, the first layer's output
    given as it is."""
    made = np.float32 if inner else TYPES[dtype]
    weights = [(RNG.standard_normal(s) / 4).astype(made) for s in ((16, 32), (32, 8))]
    stored = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    body = [("MatMul", ["a", "w0"], "h"), ("Relu", ["h"], "r"), ("MatMul", ["r", "w1"], "b")]
    nodes = [helper.make_node(op, read, [out], name=out) for op, read, out in body]
    ends = [("x", "a", TensorProto.FLOAT), ("b", "y", dtype)] if inner else []
    casts = [helper.make_node("Cast", [a], [b], to=t, name=b) for a, b, t in ends]
    if not inner:
        nodes[0].input[0], nodes[2].output[0] = "x", "y"
    values = [helper.make_tensor_value_info(n, dtype, ["N", d]) for n, d in (("x", 16), ("y", 8))]
    extra = [helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 32])] if inner else []
    order = [*casts[:1], *nodes, *casts[1:]]
    graph = helper.make_graph(order, "g", values[:1], [values[1], *extra], stored)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_other_float_types_at_the_interface(dtype: TensorProto.DataType, inner: bool) -> None:
    model, x = two_layers(dtype, inner), RNG.standard_normal((16, 16)).astype(TYPES[dtype])
    made, _ = pipeline("", model, {"x": x}, context("integer"))
    proto = made.to_proto()
    assert [f for f in check(proto, "integer") if f.severity == "error"] == []
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, proto.graph.output[0])] == [dtype, dtype]
    session = make_session(proto.SerializeToString(), threads=1)
    found, graph = run(session, {"x": x}), integer_graph(proto)
    exact = decode(graph, run_integer(graph, encode(graph, {"x": x})))
    for value, got in zip(session.get_outputs(), found, strict=True):
        assert exact[value.name].dtype == got.dtype and np.array_equal(exact[value.name], got)
    expected = make_session(model.to_proto().SerializeToString(), threads=1).run(None, {"x": x})
    assert sqnr_db(np.asarray(expected[0]), np.asarray(found[0])) > 30


def test_a_cast_inside_is_no_border() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT), helper.make_node("Relu", ["a"], ["y"])]
    values = [helper.make_tensor_value_info(n, t, [4]) for n, t in (("x", TensorProto.FLOAT16), ("y", TensorProto.FLOAT))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    assert {f.rule for f in check(proto, "integer")} >= {"QC-INT-001"}


def test_inputs_whose_elements_nothing_reads() -> None:
    """One read by no node needs no codes; of one whose shape alone is read, any do."""
    model = two_layers(TensorProto.FLOAT16, True)
    proto = model.to_proto()
    proto.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("unread", "sized"))
    proto.graph.node.append(helper.make_node("Shape", ["sized"], ["size"]))
    proto.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    feeds = {
        n: RNG.standard_normal((16, k)).astype(d) for n, k, d in (("x", 16, np.float16), ("unread", 3, "f4"), ("sized", 3, "f4"))
    }
    made = pipeline("", Model.from_proto(proto), feeds, context("integer"))[0].to_proto()
    assert [f for f in check(made, "integer") if f.severity == "error"] == []
    graph = integer_graph(made)
    assert decode(graph, run_integer(graph, encode(graph, feeds)))["size"].tolist() == [16, 3]
