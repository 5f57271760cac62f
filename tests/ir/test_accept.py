"""Files that are odd, and what is said of those that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir import model as model_module
from qcompile.ir import spill
from qcompile.ir.model import Model

node = helper.make_node


def value(name: str, shape: tuple[int, ...] = (3,)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(nodes: list[onnx.NodeProto], *weights: onnx.TensorProto) -> onnx.ModelProto:
    made = helper.make_graph(nodes, "g", [value("x")], [value("y")], list(weights))
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9
    )


def weight(number: float, name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(3, number, np.float32), name)


def loaded(proto: onnx.ModelProto, folder: Path) -> Model:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return Model.load(path)


def two_makers() -> onnx.ModelProto:
    return graph([node("Relu", ["x"], ["a"], name="one"), node("Relu", ["a"], ["a"], name="two"), node("Relu", ["a"], ["y"])])


def remade_input() -> onnx.ModelProto:
    return graph([node("Relu", ["x"], ["x"], name="one"), node("Relu", ["x"], ["y"])])


def two_weights() -> onnx.ModelProto:
    return graph([node("Add", ["x", "w"], ["y"])], weight(1), weight(2))


def two_inputs() -> onnx.ModelProto:
    proto = graph([node("Relu", ["x"], ["y"])])
    proto.graph.input.append(value("x"))
    return proto


def circle() -> onnx.ModelProto:
    return graph([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["a"], ["y"])])


def maps() -> onnx.ModelProto:
    proto = graph([node("ZipMap", ["x"], ["y"], name="zip", domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])])
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.output[0].CopyFrom(helper.make_value_info("y", helper.make_sequence_type_proto(kind)))
    return proto


def map_input() -> onnx.ModelProto:
    proto = graph([node("CastMap", ["x"], ["y"], domain="ai.onnx.ml")])
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.input[0].CopyFrom(helper.make_value_info("x", kind))
    return proto


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_makers, r"the tensor 'a' is made by two nodes \(one and two\); rename one"),
        (remade_input, "one makes 'x', which is an input or a weight"),
        (two_weights, "two initializers are named 'w'; export"),
        (two_inputs, "two inputs are named 'x'; rename one"),
        (circle, "its nodes read each other in a circle"),
        (map_input, "the input 'x' is a map, which qcompile has no data for; cut the model behind"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[], onnx.ModelProto], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        loaded(make(), tmp_path)


@pytest.mark.parametrize("threshold", [(spill, "LARGE_MODEL", 0), (model_module, "EXTERNAL_BYTES", -1), None])
def test_a_map_keeps_its_type_in_every_file(threshold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = maps()
    model = loaded(proto, tmp_path)
    if threshold:
        monkeypatch.setattr(*threshold)
    model.clone().save(tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx", load_external_data=False).graph.output[0]
    assert again.type == proto.graph.output[0].type and not again.metadata_props


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    model = loaded(graph([node("Relu", ["a"], ["y"]), node("Neg", ["x"], ["a"])]), tmp_path)
    assert [n.op_type for n in model.clone().graph] == ["Neg", "Relu"]


def test_equal_copies_of_a_weight_are_one(tmp_path: Path) -> None:
    model = loaded(graph([node("Add", ["x", "w"], ["y"])], weight(1), weight(1)), tmp_path)
    assert list(model.graph.initializers) == ["w"]


@pytest.mark.parametrize("indices", [[1], [[1]]])
def test_sparse_weights_become_dense(indices: list[int], tmp_path: Path) -> None:
    proto = graph([node("Add", ["x", "w"], ["y"])])
    where = numpy_helper.from_array(np.array(indices), "i")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(numpy_helper.from_array(np.array([5], np.float32), "w"), where, [3])
    )
    held = loaded(proto, tmp_path).graph.initializers["w"].const_value
    assert held is not None and held.numpy().tolist() == [0, 5, 0]
