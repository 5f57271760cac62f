"""Q/DQ groups, and models with groups taken out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from qcompile.backend.groups import constant_value, qdq_groups, without
from qcompile.execute.session import make_session
from qcompile.target.view import GraphView
from tests.backend.chains import LAYERS, chain
from tests.target.graphs import Builder, Form, attention, single


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return make_session(model.SerializeToString(), qdq_fusion=False, optimize="off").run(None, {"x": x})[0]


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_one_group_a_layer_in_graph_order() -> None:
    groups = qdq_groups(GraphView.open(chain({})))
    assert [g.nodes for g in groups] == [(f"n_fc{i}",) for i in range(LAYERS)]
    assert groups[0].pairs == {"n_x_q", "n_x_dq", "n_w0_dq"}


def test_readers_of_one_quantizer_belong_together() -> None:
    groups = qdq_groups(GraphView.open(attention()))
    assert groups[0].nodes == ("n_q_lin", "n_k_lin", "n_v_lin")
    assert ("n_scores",) in [g.nodes for g in groups] and ("n_o",) in [g.nodes for g in groups]


def test_codes_of_the_user_are_no_group() -> None:
    b = Builder()
    b.node("DequantizeLinear", ["x", b.tensor("s", TensorProto.FLOAT, [], 0.5)], "y")
    model = b.model([("x", TensorProto.INT8, [4])], [("y", TensorProto.FLOAT)], 21)
    assert qdq_groups(GraphView.open(model)) == ()


def test_taking_out_all_leaves_a_float_model() -> None:
    model = chain({})
    view = GraphView.open(model)
    floating = without(view, qdq_groups(view))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(floating))
    assert len(floating.graph.initializer) == LAYERS
    x = np.random.default_rng(0).uniform(-1, 1, (4, 64)).astype(np.float16)
    assert np.abs(run(floating, x) - run(model, x)).max() / np.abs(run(model, x)).max() < 0.1
    assert ops(model).count("QuantizeLinear") == LAYERS


def test_taking_out_one_leaves_the_others() -> None:
    view = GraphView.open(chain({3: "computed scale"}))
    assert "ReduceMax" in ops(view.model)
    rest = without(view, qdq_groups(view)[3:4])
    assert ops(rest).count("QuantizeLinear") == LAYERS - 1 and "ReduceMax" not in ops(rest)
    assert run(rest, np.ones((4, 64), np.float16)).shape == (4, 64)


@pytest.mark.parametrize(
    "form",
    [
        Form(op="MatMul"),
        Form(op="Gemm", trans_b=True),
        Form(op="MatMul", per_channel=False),
        Form(op="MatMul", activation=None, weight="int4", block=32),
        Form(op="MatMul", activation=None, weight="float8e4m3fn"),
        Form(op="Conv", body=TensorProto.FLOAT, scale_type=TensorProto.FLOAT),
    ],
)
def test_weights_are_dequantized_as_onnx_runtime_does(form: Form) -> None:
    model = single(form)
    value = constant_value(GraphView.open(model), "w_dq")
    dq = next(n for n in model.graph.node if n.output[0] == "w_dq")
    kept = [t for t in model.graph.initializer if t.name in dq.input]
    assert value is not None
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph = helper.make_graph([dq], "g", [], [helper.make_tensor_value_info("w_dq", kind, None)], kept)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
    assert np.array_equal(value, ort.InferenceSession(alone.SerializeToString()).run(None, {})[0])


def test_two_level_scales_and_zero_points() -> None:
    b = Builder()
    codes = b.tensor("codes", TensorProto.INT8, [2, 4], np.arange(8).reshape(2, 4))
    inner = b.node(
        "DequantizeLinear", [b.tensor("sc", TensorProto.INT8, [2, 2], 3), b.tensor("s2", TensorProto.FLOAT, [], 0.5)], "s"
    )
    zero = b.tensor("z", TensorProto.INT8, [2, 2], [[1, 0], [0, 1]])
    b.node("DequantizeLinear", [codes, inner, zero], "w", axis=1, block_size=2)
    view = GraphView.open(b.model([("x", TensorProto.FLOAT, [1])], [("w", TensorProto.FLOAT)], 21))
    expected = 1.5 * np.array([[-1, 0, 2, 3], [4, 5, 5, 6]], np.float32)
    assert np.array_equal(constant_value(view, "w"), expected)  # type: ignore[arg-type]
