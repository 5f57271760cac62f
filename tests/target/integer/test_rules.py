"""The integer rules that are not about overflow: for each a minimal graph that fires it, beside one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompile.target.catalog import TARGETS
from qcompile.target.check import check

_ZERO = np.int8(3)
METADATA = {"qcompile.rounding": "half_up", "qcompile.integer": "strict"}
SEVERITY = {r.id: r.severity for r in TARGETS["integer"].rules}


def layer(
    *,
    scale: Any = 0.5,
    zero: Any = _ZERO,
    opset: int = 21,
    names: tuple[str, str, str] = ("q", "product", "dq"),
    metadata: dict[str, str] = METADATA,
) -> onnx.ModelProto:
    """x -> QuantizeLinear -> MatMulInteger -> DequantizeLinear -> y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name=names[0]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["acc"], name=names[1]),
        helper.make_node("DequantizeLinear", ["acc", "t"], ["y"], name=names[2]),
    ]
    arrays: dict[str, NDArray[Any]] = {
        "s": np.asarray(scale, np.float32),
        "z": np.asarray(zero),
        "w": np.ones((4, 2), np.int8),
        "t": np.asarray(0.1, np.float32),
    }
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, name) for name, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, metadata)
    return model


def with_a_float_input() -> onnx.ModelProto:
    """A second float input, which nothing reads."""
    model = layer()
    model.graph.input.append(helper.make_tensor_value_info("unread", TensorProto.FLOAT, ["n"]))
    return model


def with_a_float_output() -> onnx.ModelProto:
    """A float output that is a constant, not what DequantizeLinear makes."""
    model = layer()
    model.graph.output.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, []))
    return model


def with_a_computed_scale() -> onnx.ModelProto:
    """The scale is an input of the model."""
    model = layer()
    kept = [t for t in model.graph.initializer if t.name != "s"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
    return model


def convolution(x: Any, w: Any) -> onnx.ModelProto:
    """ConvInteger on an integer input."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(x))
    ends = [
        helper.make_tensor_value_info("x", dtype, ["n", 1, 3, 3]),
        helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 1, 2, 2]),
    ]
    node = helper.make_node("ConvInteger", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(np.ones((1, 1, 2, 2), w), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, METADATA)
    return model


def with_a_float_operator() -> onnx.ModelProto:
    """A Relu behind the DequantizeLinear."""
    model = layer()
    model.graph.node[-1].output[0] = "real"
    model.graph.node.append(helper.make_node("Relu", ["real"], ["y"], name="relu"))
    return model


FIRING: list[tuple[str, Callable[[], onnx.ModelProto], str]] = [
    ("QC-INT-001", with_a_float_operator, "float tensor 'y'"),
    ("QC-INT-010", with_a_float_output, "'t'"),
    ("QC-INT-011", lambda: layer(metadata={}), "qcompile.rounding and qcompile.integer"),
    ("QC-INT-011", lambda: layer(metadata={"qcompile.integer": "strict"}), "qcompile.rounding missing"),
    ("QC-INT-014", lambda: layer(zero=np.uint8(130)), "MatMulInteger multiplies uint8 by int8"),
    ("QC-INT-014", lambda: convolution(np.int8, np.uint8), "ConvInteger multiplies int8 by uint8"),
    ("QC-INT-015", with_a_computed_scale, "'s'"),
    ("QC-INT-016", lambda: layer(scale=0), "not greater than 0"),
    ("QC-INT-016", lambda: layer(scale=-0.5), "not greater than 0"),
    ("QC-INT-017", lambda: layer(scale=np.inf), "infinite"),
    ("QC-INT-018", lambda: layer(opset=27), "27"),
    ("QC-INT-019", lambda: layer(names=("q", "q", "dq")), "'q'"),
    ("QC-INT-019", lambda: layer(names=("q", "", "dq")), ""),
]


def test_a_clean_layer_fires_nothing() -> None:
    assert check(layer(), "integer") == []
    assert check(layer(opset=26), "integer") == []


@pytest.mark.parametrize(("x", "w"), [(np.int8, np.int8), (np.uint8, np.int8), (np.uint8, np.uint8)])
def test_convolutions_of_these_types_are_exact_everywhere(x: Any, w: Any) -> None:
    assert check(convolution(x, w), "integer") == []


@pytest.mark.parametrize(("rule", "make", "message"), FIRING)
def test_a_rule_fires(rule: str, make: Callable[[], onnx.ModelProto], message: str) -> None:
    found = {f.rule: f for f in check(make(), "integer")}
    assert rule in found and message in found[rule].message
    assert found[rule].severity == SEVERITY[rule] and found[rule].fix
    assert set(found) <= {rule, "QC-INT-010"}, "a border that cannot be read has the scale's rule beside it"


def test_an_input_that_nothing_reads_may_be_float() -> None:
    assert not check(with_a_float_input(), "integer")


def test_every_rule_of_this_table_is_fired() -> None:
    proven = {f"QC-INT-{n:03}" for n in (*range(1, 10), 12, 13)}  # tests/oracle/test_ranges.py
    assert {rule for rule, _, _ in FIRING} >= SEVERITY.keys() - proven
