"""Files as strangers write them: mapped from a size on, and distrusted in the same words whoever reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir import reader
from qcompile.ir.mapped import MappedTensor, let_go
from qcompile.ir.model import Model
from qcompile.ir.reader import file_bytes, read_proto
from tests.ir import tiny
from tests.ir.test_model import external

READERS = [Model.load, read_proto, lambda path: read_proto(path, weights=False), file_bytes]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAPPED_FILE", 0)
    monkeypatch.setattr(reader, "SKIMMED_FILE", 0)


def weighted() -> onnx.ModelProto:
    """Weights of several types above 16 KiB, at odd places of the file."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((80, 80)).astype(np.float32),
        "h": rng.standard_normal((100, 100)).astype(np.float16),
        "q": rng.integers(-128, 127, (200, 100)).astype(np.int8),
        "small": np.ones(3, np.float32),
    }
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    outputs = [
        helper.make_tensor_value_info(f"{n}_out", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()
    ]
    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.usefixtures("mapped")
def test_a_mapped_file_is_the_same_model(tmp_path: Path) -> None:
    proto = weighted()
    path = save(proto, tmp_path)
    model, whole = Model.load(path), Model.from_proto(proto)
    kinds = {n: type(v.const_value) for n, v in model.graph.initializers.items()}
    assert [n for n, kind in kinds.items() if kind is MappedTensor] == ["w", "h", "q"]
    assert model.digest() == whole.digest()
    assert model.to_proto().SerializeToString(deterministic=True) == whole.to_proto().SerializeToString(deterministic=True)
    let_go(model.ir)
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else None
        stored = whole.graph.initializers[name].const_value
        assert array is not None and array.flags.aligned and stored is not None and array.tobytes() == stored.tobytes()


def test_a_file_that_is_read_whole_is_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SKIMMED_FILE", 0)
    proto = weighted()
    model = Model.load(save(proto, tmp_path))
    assert isinstance(model.graph.initializers["w"].const_value, MappedTensor)
    assert model.digest() == Model.from_proto(proto).digest()


@pytest.mark.usefixtures("mapped")
def test_a_file_put_in_its_place_changes_nothing(tmp_path: Path) -> None:
    path = save(weighted(), tmp_path)
    model = Model.load(path)
    digest = model.digest()
    model.save(path)
    (tmp_path / "other").write_bytes(b"nothing")
    os.replace(tmp_path / "other", path)
    let_go(model.ir)
    assert model.digest() == digest


def typed_data(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, values.shape, values.reshape(-1).tolist()))


def a_string(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x" * 20000]))


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("change", [typed_data, a_string])
def test_what_is_stored_otherwise_is_read(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    proto = weighted()
    change(proto)
    found, whole = Model.load(save(proto, tmp_path)), Model.from_proto(proto)
    assert found.to_proto().SerializeToString(deterministic=True) == whole.to_proto().SerializeToString(deterministic=True)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("seed", range(40))
def test_a_broken_file_is_refused_or_read_as_the_parser_reads_it(seed: int, tmp_path: Path) -> None:
    rng, data = np.random.default_rng(seed), bytearray(weighted().SerializeToString())
    at = rng.integers(0, len(data), 3) if seed % 2 else rng.integers(0, 60, 2)
    for i in at:
        data[i] = rng.integers(0, 256)
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(data[: len(data) - int(rng.integers(0, 2)) * 999]))
    results: list[str | None] = []
    for limit in (0, 1 << 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "SKIMMED_FILE", limit)
            try:
                results.append(Model.load(path).digest())
            except (ModelError, RuntimeError):  # onnx_ir does not clone every broken graph
                results.append(None)
    assert results[0] == results[1]


# distrust -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p.parent / "m.data").unlink(), r"weights file m\.data is missing; put it beside the model"),
        (lambda p: (p.parent / "m.data").write_bytes(b"1"), r"weights file m\.data is truncated; copy it again"),
        (lambda p: p.write_bytes(b"\xff" * 99), "is not a readable ONNX model"),
        (lambda p: p.write_bytes(b""), "is not an ONNX model"),
        (lambda p: p.unlink(), "no model at .*: check the path"),
    ],
)
def test_one_text_for_each_fault(
    read: Callable[[Path], object], harm: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = external(tmp_path)
    harm(path)
    with pytest.raises(ModelError, match=message):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_weights_outside_the_folder_are_not_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in")
    (tmp_path / "in" / "m.data").rename(tmp_path / "m.data")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../m.data" if entry.key == "location" else entry.value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        read(path)


def test_external_data_is_read_on_demand(tmp_path: Path) -> None:
    path = external(tmp_path)
    whole, bare = read_proto(path), read_proto(path, weights=False)
    assert numpy_helper.to_array(whole.graph.initializer[0]).tobytes() == tiny.linear().graph.initializer[0].raw_data
    assert not bare.graph.initializer[0].raw_data


def test_a_models_size_is_that_of_all_its_files(tmp_path: Path) -> None:
    path = external(tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) > 1
    assert file_bytes(path) == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.pt", "a PyTorch file, not an ONNX model; export it with torch.onnx.export"),
        ("m.tflite", "TensorFlow or Keras model, not .*tf2onnx"),
        ("m.engine", "an engine, not an ONNX model; give the ONNX file"),
        ("m.onnx", "is the file complete"),
        ("folder", "is a folder; name the ONNX file in it, e.g. .*inner.onnx"),
    ],
)
def test_what_is_no_onnx_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.onnx").touch()
    if name != "folder":
        (tmp_path / name).write_bytes(b"\x1c\x00junk")
    with pytest.raises(ModelError, match=message):
        read_proto(tmp_path / name)
