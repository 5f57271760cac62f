"""The exported JSON: a reader in pure Python computes the same integers from the document alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.cli import main
from qcompile.errors import ModelError
from qcompile.oracle.export import export_document
from qcompile.oracle.run import encode, run_integer
from qcompile.verbs.export_integer import export_file
from tests.oracle import reader
from tests.oracle.build import model_of, node, requantize_constants, requantize_nodes
from tests.oracle.models import MODELS, compiled


@pytest.mark.parametrize(("name", "bits"), [*((name, ()) for name in MODELS), ("cnn", ("op:Conv=w4a4",))])
def test_a_pure_python_reader_computes_the_same_integers(name: str, bits: tuple[str, ...], tmp_path: Path) -> None:
    path, data = compiled(name, tmp_path, bits=bits)
    export_file(path, tmp_path / "net.json")
    model = onnx.load(path)
    codes = encode(model, {k: v[:3] for k, v in data.items()})
    ours = run_integer(model, codes)
    document = reader.load(tmp_path / "net.json")
    assert {layer["weight_bits"] for layer in document["layers"] if layer["op"] == "conv"} <= ({4, 1} if bits else {8, 1})
    theirs = reader.run(document, {k: (v.shape, v.reshape(-1).tolist()) for k, v in codes.items()})
    for key, array in ours.items():
        assert theirs[key] == (array.shape, array.reshape(-1).tolist())
    assert {o["tensor"]: o["dtype"] for o in document["outputs"]} == {key: str(array.dtype) for key, array in ours.items()}


def test_requantization_is_one_layer_with_its_numbers() -> None:
    e = np.array([31, 36, 40]).reshape(3, 1)
    constants = {
        "m": np.array([[1 << 30], [7], [-5]]),
        "e": e.astype(np.uint64),
        "z": np.asarray(4),
        **requantize_constants("y", e),
    }
    acc = {"acc": np.array([[1, 2], [3, 4], [-(1 << 30), 1 << 30]], np.int32)}
    model = model_of(requantize_nodes("acc", "y", "m", "e", zero="z"), acc, ["y"], constants)
    document = export_document(model)
    (layer,) = document["layers"]
    assert layer["op"] == "requantize" and layer["dtype"] == "int8" and layer["inputs"] == ["acc"]
    assert reader.unpack(layer["m"])[1] == [1 << 30, 7, -5] and reader.unpack(layer["e"])[1] == [31, 36, 40]
    assert reader.unpack(layer["zero_point"])[1] == [4] and reader.unpack(layer["low"])[1] == [-128]
    expected = run_integer(model, acc)["y"]
    assert reader.run(document, {"acc": ((3, 2), acc["acc"].reshape(-1).tolist())})["y"][1] == expected.reshape(-1).tolist()


def test_a_value_that_others_read_is_not_fused_away() -> None:
    constants = {"w": np.ones((2, 2), np.int8), "b": np.ones(2, np.int32)}
    nodes = [node("MatMulInteger", ["x", "w"], "acc"), node("Add", ["acc", "b"], "y"), node("Mul", ["acc", "y"], "z")]
    model = model_of(nodes, {"x": np.ones((1, 2), np.int8)}, ["z"], constants)
    assert [layer["op"] for layer in export_document(model)["layers"]] == ["matmul", "add", "mul"]


def test_the_command_writes_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = compiled("cnn", tmp_path)
    capsys.readouterr()
    assert main(["export-integer", str(path), "-o", str(tmp_path / "net.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    document = json.loads((tmp_path / "net.json").read_text())
    assert printed["layers"]["requantize"] == sum(layer["op"] == "requantize" for layer in document["layers"])
    assert document["inputs"][0]["name"] == "x" and document["profile"] == "strict"
    assert main(["export-integer", str(path)]) == 0
    assert path.with_suffix(".json").read_bytes() == (tmp_path / "net.json").read_bytes()


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    onnx.save(MODELS["cnn"]()[0], tmp_path / "float.onnx")
    with pytest.raises(ModelError, match="--target integer"):
        export_file(tmp_path / "float.onnx", tmp_path / "net.json")
    assert not (tmp_path / "net.json").exists()
