"""The 16-bit lowering asks each operator's schema: what it does not take stays float32, and the result loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.execute.opening import open_model
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.report import PassReport
from tests.passes.models import Feeds
from tests.passes.running import context, run_passes

node = helper.make_node
T = onnx.TensorProto
RNG = np.random.default_rng(0)


def model(nodes: list[onnx.NodeProto], weights: dict[str, Any], opset: int = 17, outs: dict[str, Any] | None = None) -> Model:
    """x [N, 5, 16] -> y and others; nothing between them has a declared type."""
    ends = [helper.make_tensor_value_info(n, T.FLOAT, s) for n, s in (outs or {"y": ["N", 5, 16]}).items()]
    x = helper.make_tensor_value_info("x", T.FLOAT, ["N", 5, 16])
    arrays = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], ends, arrays)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


def lowered(source: Model, spec: str = "fp16") -> tuple[Model, PassReport]:
    """Behind the pass, compared with the float model by the runner (which loads and runs it)."""
    feeds: Feeds = {"x": RNG.standard_normal((8, 5, 16)).astype(np.float32)}
    done, reports = run_passes(source, registry.parse(f"canonicalize,{spec}"), feeds, context("trt", spec))
    open_model(done).run(None, feeds)
    return done, reports[-1]


def types(made: Model) -> dict[str, ir.DataType | None]:
    return {str(n.name): n.outputs[0].dtype for n in made.graph if n.op_type != "Cast"}


def reasons(report: PassReport) -> dict[str, str]:
    return {r.node: r.reason for r in report.remarks if r.kind == "missed"}


def test_an_operator_whose_schema_lacks_the_type_stays_float32() -> None:
    made, report = lowered(
        model([node("Celu", ["x"], ["c"], name="celu"), node("MatMul", ["c", "w"], ["y"], name="fc")], {"w": normal(16, 16)})
    )
    assert types(made) == {"celu": ir.DataType.FLOAT, "fc": ir.DataType.FLOAT16}
    assert reasons(report) == {"celu": "kept in float32: Celu of opset 17 is not computed in float16"}


def test_bfloat16_asks_the_schemas_of_opset_22() -> None:
    """TensorRT takes bfloat16 convolutions and pools of any opset."""
    nodes = [node("Swish", ["x"], ["y"], name="swish"), node("MaxPool", ["x"], ["z"], name="pool", kernel_shape=[2])]
    outs = {"y": ["N", 5, 16], "z": ["N", 5, 15]}
    made, _ = lowered(model(nodes, {}, 24, outs), "bf16")
    assert set(types(made).values()) == {ir.DataType.BFLOAT16}
    made, report = lowered(model(nodes[1:], {}, 17, {"z": ["N", 5, 15]}), "bf16")
    assert types(made) == {"pool": ir.DataType.BFLOAT16} and not reasons(report)


def test_outputs_that_the_schema_ties_to_float32_stay_so() -> None:
    nodes = [
        node("LayerNormalization", ["x", "g"], ["n", "mean", "deviation"], name="norm"),
        node("MatMul", ["n", "w"], ["m"], name="fc"),
        node("Mul", ["m", "deviation"], ["s"], name="mul"),
        node("Add", ["s", "mean"], ["y"], name="add"),
    ]
    made, _ = lowered(model(nodes, {"g": np.ones(16, np.float32), "w": normal(16, 16)}))
    (norm,) = [n for n in made.graph if n.op_type == "LayerNormalization"]
    assert [v.dtype for v in norm.outputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT]
    assert types(made)["fc"] == ir.DataType.FLOAT16


def test_operators_without_a_schema_stay_float32_and_so_do_their_outputs() -> None:
    nodes = [
        node("SampleOp", ["x"], ["h"], name="sample", domain="com.microsoft"),
        node("MatMul", ["h", "w"], ["m"], name="fc"),
        node("SampleOp", ["m"], ["y"], name="last", domain="com.microsoft"),
    ]
    made, report = lowered(model(nodes, {"w": normal(16, 16)}))
    assert types(made) == {"sample": ir.DataType.FLOAT, "fc": ir.DataType.FLOAT16, "last": ir.DataType.FLOAT}
    assert reasons(report)["sample"] == "kept in float32: com.microsoft operators are not known to take float16"


def test_sequences_are_left_as_they_are() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="fc"),
        node("SplitToSequence", ["m", "half"], ["parts"], name="split", axis=0),
        node("SequenceAt", ["parts", "one"], ["part"], name="at"),
        node("SequenceInsert", ["parts", "part"], ["more"], name="insert"),
        node("ConcatFromSequence", ["more"], ["c"], name="join", axis=0),
        node("MatMul", ["c", "v"], ["y"], name="out"),
    ]
    weights = {"w": normal(16, 16), "v": normal(16, 16), "half": np.int64(1), "one": np.int64(1)}
    made, report = lowered(model(nodes, weights))
    assert {n for n, t in types(made).items() if t == ir.DataType.FLOAT16} == {"fc", "out"}
    assert {"split", "at", "insert", "join"} <= reasons(report).keys()


@pytest.mark.parametrize("spec", ["fp16", "bf16"])
def test_a_recurrent_operator_with_lengths_stays_float32(spec: str) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], name="turn", perm=[1, 0, 2]),
        node("Shape", ["x"], ["n"], name="shape", start=0, end=1),
        node("ConstantOfShape", ["n"], ["lengths"], name="lengths", value=onnx.numpy_helper.from_array(np.array([3], np.int32))),
        node("GRU", ["t", "w", "r", "", "lengths"], ["", "h"], name="gru", hidden_size=16),
        node("MatMul", ["h", "v"], ["y"], name="out"),
    ]
    weights = {"w": normal(1, 48, 16), "r": normal(1, 48, 16), "v": normal(16, 16)}
    made, report = lowered(model(nodes, weights, 22, {"y": [1, "N", 16]}), spec)
    assert {"gru", "turn"} <= reasons(report).keys()
    assert types(made)["out"] == (ir.DataType.FLOAT16 if spec == "fp16" else ir.DataType.BFLOAT16)


def test_positions_stay_float32_up_to_where_they_meet_data() -> None:
    """As detectors count the cells of their grid, from a size that only the run knows."""
    nodes = [
        node("Shape", ["x"], ["n"], name="shape", start=0, end=1),
        node("Squeeze", ["n"], ["k"], name="number"),
        node("Cast", ["k"], ["limit"], name="cast", to=T.FLOAT),
        node("Range", ["zero", "limit", "one"], ["r"], name="range"),
        node("Add", ["r", "half"], ["centre"], name="centre"),
        node("Unsqueeze", ["centre", "last"], ["column"], name="column"),
        node("MatMul", ["x", "w"], ["m"], name="fc"),
        node("Add", ["m", "column"], ["y"], name="grid"),
    ]
    numbers = {
        "zero": np.float32(0),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "last": np.array([1, 2]),
        "w": normal(16, 16),
    }
    made, report = lowered(model(nodes, numbers))
    assert {n for n, t in types(made).items() if t == ir.DataType.FLOAT16} == {"fc", "grid"}
    assert {"cast", "range", "centre", "column"} <= reasons(report).keys()
    (cast,) = [n for n in made.graph if n.op_type == "Cast" and n.inputs[0] is not None and str(n.inputs[0].name) == "column"]
    assert cast.outputs[0].dtype == ir.DataType.FLOAT16


def test_tensors_that_were_16_bits_wide_before_keep_their_casts() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="fc"),
        node("Cast", ["m"], ["h"], name="down", to=T.FLOAT16),
        node("Cast", ["h"], ["y"], name="up", to=T.FLOAT),
    ]
    made, _ = lowered(model(nodes, {"w": normal(16, 16)}))
    assert made.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert [n.op_type for n in made.graph] == ["Cast", "MatMul", "Cast"]


@pytest.mark.parametrize("opset", [21, 23])
def test_codes_are_computed_in_float32(opset: int) -> None:
    """From opset 23 the division of QuantizeLinear takes the type of the scale where nothing is said."""
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    scale = np.float32(np.float16(0.0251))
    source, x = model(nodes, {"s": scale, "z": np.int8(0)}, opset), RNG.standard_normal((8, 5, 16)).astype(np.float32)
    made, _ = run_passes(source, registry.parse("fp16"), {"x": x}, context("trt", "w8a8"))
    (q,) = (n for n in made.graph if n.op_type == "QuantizeLinear")
    told = q.attributes.get("precision")
    assert q.inputs[1] is not None and q.inputs[1].dtype == ir.DataType.FLOAT16
    assert (told.as_int() if told else None) == (ir.DataType.FLOAT if opset == 23 else None)
    codes = np.rint(x.astype(np.float16).astype(np.float32) / scale).clip(-128, 127)
    np.testing.assert_array_equal(open_model(made).run(None, {"x": x})[0], (codes * scale).astype(np.float16))
