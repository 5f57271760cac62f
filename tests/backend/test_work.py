"""Shapes and FLOPs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.backend.shapes import concrete_shapes
from qcompile.backend.work import work_items
from qcompile.target.attention import attention_blocks, attention_products
from qcompile.target.view import GraphView
from tests.target.graphs import AttentionForm, Form, attention, single


def flops(model: onnx.ModelProto, **inputs: tuple[int, ...]) -> dict[str, int | None]:
    view = GraphView(model)
    return {i.node: i.flops for i in work_items(view, concrete_shapes(model, inputs))}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form(), 2 * 6 * 6 * 32 * 32 * 9),
        (Form(op="ConvTranspose"), 2 * 8 * 8 * 32 * 32 * 4),
        (Form(op="MatMul"), 2 * 4 * 64 * 32),
        (Form(op="Gemm", trans_b=True), 2 * 4 * 64 * 32),
    ],
    ids=lambda v: v.op if isinstance(v, Form) else None,
)
def test_flops(form: Form, expected: int) -> None:
    assert flops(single(form)) == {"n_y": expected}


def test_planned_types() -> None:
    items = work_items(GraphView(single(Form())), {})
    assert (items[0].low_type, items[0].weight_type, items[0].flops) == ("int8", None, None)
    items = work_items(GraphView(single(Form(op="MatMul", activation=None, weight="int4"))), {})
    assert (items[0].low_type, items[0].weight_type) == (None, "int4")


def test_native_attention_op() -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="att")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4, 16, 8]) for n in "qkv"]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "g", values, [y]), opset_imports=[helper.make_opsetid("", 23)])
    assert flops(model) == {"att": 2 * 2 * 4 * 16 * 16 * 16}
    assert attention_products(GraphView(model)) == [{"att"}]


def test_attention_blocks() -> None:
    for form in (AttentionForm(), AttentionForm(frozenset()), AttentionForm(packed=True, scores=True)):
        blocks = attention_blocks(GraphView(attention(form)))
        assert [(b.scores.matmul.name, b.softmax.name, b.values.matmul.name) for b in blocks] == [("n_scores", "n_p", "n_o")]


def test_shapes_through_computed_pads() -> None:
    """Exporters compute pads and reshape targets in the graph; their values must be followed."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["r"]),
        helper.make_node("ConstantOfShape", ["two"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.int64))),
        helper.make_node("Concat", ["pads", "zeros"], ["all"], axis=0),
        helper.make_node("Pad", ["r", "all"], ["y"]),
    ]
    constants = {"zero": 0, "axes": [0], "rest": [4, 8], "two": [2], "pads": [0, 0, 1, 0]}
    tensors = [numpy_helper.from_array(np.array(v, dtype=np.int64), k) for k, v in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 17)])
    shapes = concrete_shapes(model, {"x": (8, 32)})
    assert shapes["r"] == [8, 4, 8] and shapes["y"] == [8, 4, 9]
