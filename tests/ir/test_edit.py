from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.ir.edit import (
    add_constant,
    drop_if_unused,
    erase_dead,
    fresh_name,
    insert_after,
    new_node,
    replace_value,
    set_constant,
    sort,
    splice_after,
)  # fmt: skip
from qcompile.ir.model import Model
from qcompile.ir.verify import verify_structure
from tests.ir import tiny

X = np.random.default_rng(5).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def model() -> Model:
    return Model.from_proto(tiny.linear())


def run(model: Model) -> np.ndarray:
    verify_structure(model, "edit")
    return tiny.run(model, {"x": X})


def test_set_constant_copies_on_write(model: Model) -> None:
    graph, w = model.graph, model.graph.initializers["w"]
    new = set_constant(graph.node(0), 1, np.zeros((4, 4)))
    assert new is not w and graph.node(0).inputs[1] is new
    assert graph.node(2).inputs[1] is w and w.const_value is not None and w.const_value.numpy().any()
    assert new.dtype == ir.DataType.FLOAT
    assert np.array_equal(run(model), np.broadcast_to(tiny_bias(model), (3, 4)))


def tiny_bias(model: Model) -> np.ndarray:
    tensor = model.graph.initializers["bias"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_set_constant_drops_the_old_one_once_nobody_reads_it(model: Model) -> None:
    for i in (0, 2):
        set_constant(model.graph.node(i), 1, np.eye(4))
    assert "w" not in model.graph.initializers
    assert len(model.graph.initializers) == 3


def test_set_constant_leaves_a_clone_alone(model: Model) -> None:
    copy, before = model.clone(), model.digest()
    set_constant(copy.graph.node(0), 1, np.zeros((4, 4)))
    assert model.digest() == before


def test_set_constant_keeps_half_precision() -> None:
    proto = tiny.linear()
    model = Model.from_proto(proto)
    value = add_constant(model.graph, "h", np.ones(4, np.float16))
    model.graph.node(3).replace_input_with(1, value)
    assert set_constant(model.graph.node(3), 1, np.full(4, 0.5)).dtype == ir.DataType.FLOAT16


def test_fresh_names_never_meet(model: Model) -> None:
    names = [fresh_name(model.graph, "h") for _ in range(3)]
    assert names == ["h_1", "h_1_2", "h_1_2_3"] or len({"h", *names}) == 4
    value = add_constant(model.graph, "w", np.zeros(1, np.float32))
    assert value.name != "w"


def test_fresh_names_avoid_those_of_branches() -> None:
    model = Model.from_proto(tiny.branches())
    assert fresh_name(model.graph, "w") != "w"


def test_splice_after_an_inner_value(model: Model) -> None:
    expected = run(model)
    h = model.graph.node(0).outputs[0]
    node = new_node(model.graph, "Identity", [h], name="copy", like=h)
    splice_after(model.graph, h, node)
    assert [n.op_type for n in model.graph] == ["MatMul", "Identity", "Relu", "MatMul", "Add"]
    assert h.shape is None or node.outputs[0].shape is not h.shape
    assert np.array_equal(run(model), expected)


def test_splice_after_an_output_keeps_its_name(model: Model) -> None:
    y = model.graph.outputs[0]
    splice_after(model.graph, y, new_node(model.graph, "Neg", [y], name="neg"))
    assert model.graph.outputs[0].name == "y" and model.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert y.name == "y_pre"
    assert np.array_equal(run(model), -tiny.run(tiny.linear(), {"x": X}))


def test_splice_after_an_input(model: Model) -> None:
    x = model.graph.inputs[0]
    splice_after(model.graph, x, new_node(model.graph, "Neg", [x], name="neg", like=x))
    assert np.array_equal(run(model), tiny.run(tiny.linear(), {"x": -X}))
    assert [v.name for v in model.graph.inputs] == ["x"]


def test_splice_after_an_input_that_is_also_an_output() -> None:
    proto = tiny.linear()
    proto.graph.output.append(helper.make_tensor_value_info("x", 1, ["N", 4]))
    model = Model.from_proto(proto)
    x = model.graph.inputs[0]
    splice_after(model.graph, x, new_node(model.graph, "Neg", [x], name="neg", like=x))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y", "x"]
    run(model)


def test_splice_after_reaches_into_branches() -> None:
    model = Model.from_proto(tiny.branches())
    x = model.graph.inputs[0]
    splice_after(model.graph, x, new_node(model.graph, "Neg", [x], name="neg", like=x))
    feeds = {"x": X, "c": np.array(True)}
    assert np.array_equal(tiny.run(model, feeds), tiny.run(tiny.branches(), feeds | {"x": -X}))


def test_replace_value_and_erase_dead(model: Model) -> None:
    graph = model.graph
    replace_value(graph, graph.node(1).outputs[0], graph.node(0).outputs[0])
    erase_dead(model)
    assert [n.op_type for n in graph] == ["MatMul", "MatMul", "Add"]
    replace_value(graph, graph.outputs[0], graph.node(1).outputs[0])
    erase_dead(model)
    assert [n.op_type for n in graph] == ["MatMul", "MatMul"]
    assert graph.outputs[0].name == "y" and "bias" not in graph.initializers
    run(model)


def test_insert_and_sort(model: Model) -> None:
    graph = model.graph
    late = new_node(graph, "Neg", [graph.node(0).outputs[0]], name="late")
    graph.append(late)
    graph.node(1).replace_input_with(0, late.outputs[0])
    sort(graph)
    run(model)
    insert_after(graph, graph.inputs[0], new_node(graph, "Neg", [graph.inputs[0]], name="first"))
    assert graph.node(0).op_type == "Neg"


def test_drop_if_unused_keeps_what_is_read(model: Model) -> None:
    drop_if_unused(model.graph, model.graph.initializers["w"])
    assert "w" in model.graph.initializers
