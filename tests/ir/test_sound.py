"""What a file says of itself is checked before native code believes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.ir.reader import read_proto

FLOAT = TensorProto.FLOAT


def model(*nodes: onnx.NodeProto, dim: int = 4, weight: TensorProto | None = None) -> onnx.ModelProto:
    x, y = helper.make_tensor_value_info("x", FLOAT, ["N", dim]), helper.make_tensor_value_info("y", FLOAT, None)
    weight = weight or numpy_helper.from_array(np.ones(4, np.float32), "w")
    graph = helper.make_graph(nodes or [helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def short(dims: list[int], raw: bytes) -> TensorProto:
    return TensorProto(name="w", data_type=FLOAT, dims=dims, raw_data=raw)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (model(helper.make_node("LayerNormalization", ["x", "w"], ["y"], axis=2**63 - 1)), "axis 9223372036854775807"),
        (model(dim=2**40), "an axis of 1,099,511,627,776"),
        (model(weight=short([4], bytes(12))), "takes 16 bytes, the file holds 12"),
        (model(weight=short([2**40, 2**20], bytes(16))), "the file holds 16"),
        (model(weight=short([-4], bytes(16))), "negative size"),
    ],
)  # fmt: skip
def test_a_model_that_lies_is_refused(tmp_path: Path, made: onnx.ModelProto, what: str) -> None:
    onnx.save(made, tmp_path / "m.onnx")
    for read in (read_proto, Model.load):
        with pytest.raises(ModelError, match=what):
            read(tmp_path / "m.onnx")


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    made = model(helper.make_node("A", ["x"], ["y"], domain="own"))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for name, other in (("A", "B"), ("B", "A")):
        node = helper.make_node(other, ["a"], ["b"], domain="own")
        made.functions.append(helper.make_function("own", name, ["a"], ["b"], [node], imports))
    made.opset_import.append(imports[1])
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="'A' calls itself"):
        Model.load(tmp_path / "m.onnx")


def external(folder: Path) -> Path:
    """A model with its weight in w.bin."""
    folder.mkdir(parents=True)
    onnx.save(model(), folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


def weight(path: Path) -> list[float]:
    value = Model.load(path).graph.initializers["w"].const_value
    assert value is not None and numpy_helper.to_array(read_proto(path).graph.initializer[0]).tolist() == value.numpy().tolist()
    return value.numpy().tolist()


def test_hard_links_read_like_any_file(tmp_path: Path) -> None:
    path = external(tmp_path / "a")
    (tmp_path / "copy").hardlink_to(path.with_name("w.bin"))
    assert weight(path) == [1.0] * 4


def test_a_cache_of_links_is_followed_and_a_link_of_the_model_is_not(tmp_path: Path) -> None:
    blobs, snapshot = external(tmp_path / "blobs").parent, tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "w.bin").symlink_to(blobs / "w.bin")
    (snapshot / "m.onnx").symlink_to(blobs / "m.onnx")
    assert weight(snapshot / "m.onnx") == [1.0] * 4
    (snapshot / "m.onnx").unlink()
    (snapshot / "m.onnx").write_bytes((blobs / "m.onnx").read_bytes())
    with pytest.raises(ModelError, match="outside the model's folder"):
        Model.load(snapshot / "m.onnx")
