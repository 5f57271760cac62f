"""Texts and maps beside and behind the network stay what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.errors import DataError

node, RNG = helper.make_node, np.random.default_rng(0)
CATS = ["red", "green", "blue"]


def pipeline(folder: Path) -> Path:
    """A text in front (a category), one beside (a name), behind a map and a text: as scikit-learn's converters write them."""
    shapes = {"w": (32, 128), "w2": (128, 128), "w3": (128, 3), "rows": (3, 32)}
    weights = [numpy_helper.from_array((RNG.standard_normal(s) / 8).astype(np.float32), n) for n, s in shapes.items()]
    weights.append(numpy_helper.from_array(np.array(CATS, object), "titles"))
    ml: dict[str, Any] = {"domain": "ai.onnx.ml"}
    nodes = [
        node("LabelEncoder", ["cat"], ["code"], keys_strings=CATS, values_int64s=[0, 1, 2], default_int64=0, **ml),
        node("Gather", ["rows", "code"], ["row"]), node("Add", ["x", "row"], ["a"]),
        node("MatMul", ["a", "w"], ["b"]), node("Relu", ["b"], ["c"]), node("MatMul", ["c", "w2"], ["d"]),
        node("Relu", ["d"], ["e"]),
        node("MatMul", ["e", "w3"], ["f"]), node("Softmax", ["f"], ["p"], axis=1),
        node("ZipMap", ["p"], ["prob"], classlabels_strings=CATS, **ml),
        node("ArgMax", ["p"], ["best"], axis=1, keepdims=0), node("Gather", ["titles", "best"], ["label"]),
        node("Identity", ["name"], ["name_out"]),
    ]  # fmt: skip
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    texts = [helper.make_tensor_value_info(n, TensorProto.STRING, ["N"]) for n in ("cat", "name", "label", "name_out")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])
    outputs = [helper.make_value_info("prob", helper.make_sequence_type_proto(kind)), *texts[2:]]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    made = helper.make_graph(nodes, "g", [x, *texts[:2]], outputs, weights)
    onnx.save(helper.make_model(made, opset_imports=imports, ir_version=8), folder / "m.onnx")
    data = {"x": RNG.standard_normal((24, 32)).astype(np.float32), "cat": np.array(CATS * 8), "name": np.arange(24).astype(str)}
    np.savez(folder / "m.calib.npz", **data)  # pyright: ignore[reportArgumentType]
    return folder / "m.onnx"


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_texts_and_maps_go_through(tmp_path: Path, target: str) -> None:
    source = pipeline(tmp_path)
    result = qcompile.compile(source, target=target, output=tmp_path / "q.onnx", threads=1)
    assert result.compared is not None and (result.compared.sqnr_db or 0) > 20
    assert {o.name: o.equal for o in result.outputs if o.equal is not None}.keys() == {"label", "name_out"}
    sessions = [ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (source, tmp_path / "q.onnx")]
    was, now = ([(v.name, v.type) for v in (*s.get_inputs(), *s.get_outputs())] for s in sessions)
    assert was == now and "map(string" in str(now)
    feeds = {"x": np.ones((2, 32), np.float32), "cat": np.array(CATS[:2], object), "name": np.array(["a", "b"], object)}
    found: Any = sessions[1].run(None, feeds)
    prob, label, name = found
    assert set(prob[0]) == set(CATS) and list(name) == ["a", "b"] and set(label) <= set(CATS)


def test_objects_in_data_are_not_read(tmp_path: Path) -> None:
    source = pipeline(tmp_path)
    with np.load(tmp_path / "m.calib.npz") as data:
        arrays = {n: data[n].astype(object) if n == "cat" else data[n] for n in data.files}
    np.savez(tmp_path / "m.calib.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"texts as array.astype\(str\)"):
        qcompile.compile(source, target="ort", output=tmp_path / "q.onnx")
