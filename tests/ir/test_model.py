from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir import model as model_module
from qcompile.ir.model import InputInfo, Model
from tests.ir import tiny

X = np.random.default_rng(5).normal(size=(3, 4)).astype(np.float32)
C = np.array(True)


def external(folder: Path, proto: onnx.ModelProto | None = None, name: str = "m") -> Path:
    """The tiny linear model with all weights in a file beside it."""
    path = folder / f"{name}.onnx"
    how = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 0, "convert_attribute": True}
    onnx.save(proto or tiny.linear(), path, **how)
    return path


def feeds(build: Callable[[], onnx.ModelProto]) -> dict[str, np.ndarray]:
    return {"x": X, "c": C} if build is tiny.branches else {"x": X}


# load -> save -------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["embedded", "external"])
@pytest.mark.parametrize("build", [tiny.linear, tiny.branches])
def test_unchanged_load_save_keeps_the_outputs_bits(build: Callable[[], onnx.ModelProto], store: str, tmp_path: Path) -> None:
    proto = build()
    path = external(tmp_path, build()) if store == "external" else tmp_path / "m.onnx"
    if store == "embedded":
        onnx.save(proto, path)
    out = Model.load(path).save(tmp_path / "out.onnx")
    assert tiny.run(out, feeds(build)).tobytes() == tiny.run(proto, feeds(build)).tobytes()
    onnx.checker.check_model(str(out), full_check=True)


def test_functions_and_custom_domains_survive(tmp_path: Path) -> None:
    proto = tiny.linear()
    body = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("my", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("my", 1))
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Act", "my"
    out = Model.from_proto(proto).save(tmp_path / "out.onnx")
    assert np.array_equal(tiny.run(out, {"x": X}), tiny.run(proto, {"x": X}))


def test_metadata_survives(tmp_path: Path) -> None:
    model = Model.from_proto(tiny.linear())
    model.metadata["license"] = "MIT"
    model.graph.node(0).metadata_props["site"] = "qkv"
    model.graph.node(0).outputs[0].metadata_props["unit"] = "1"
    back = Model.load(model.save(tmp_path / "m.onnx"))
    assert back.metadata["license"] == "MIT"
    assert back.graph.node(0).metadata_props["site"] == "qkv"
    assert back.graph.node(0).outputs[0].metadata_props["unit"] == "1"
    assert back.ir.producer_name == "tiny"


def test_omitted_optional_outputs_stay_omitted(tmp_path: Path) -> None:
    proto = tiny.linear()
    proto.graph.node[1].CopyFrom(helper.make_node("Dropout", ["h"], ["a", ""]))
    path = Model.from_proto(proto).save(tmp_path / "m.onnx")
    assert list(onnx.load(path).graph.node[1].output) in (["a", ""], ["a"])


def test_the_long_name_of_the_default_domain_is_understood() -> None:
    proto = tiny.linear()
    proto.opset_import[0].domain = "ai.onnx"
    assert Model.from_proto(proto).opset == 17


def test_inputs_leave_out_initializers() -> None:
    proto = tiny.linear()
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 4]))
    assert Model.from_proto(proto).inputs() == [InputInfo("x", np.dtype(np.float32), ("N", 4))]


def test_clone_is_independent() -> None:
    model = Model.from_proto(tiny.linear())
    before = model.digest()
    copy = model.clone()
    copy.graph.node(1).op_type = "Sigmoid"
    copy.metadata["a"] = "b"
    assert model.digest() == before and not model.metadata


# names --------------------------------------------------------------------------------------------


def test_names_are_unique_and_known_ones_kept() -> None:
    proto = tiny.linear()
    for node, name in zip(proto.graph.node, ["a", "a", "", "MatMul_2"], strict=True):
        node.name = name
    assert [n.name for n in Model.from_proto(proto).graph] == ["a", "a_1", "MatMul_2_1", "MatMul_2"]


def test_names_are_unique_across_branches() -> None:
    proto = tiny.branches()
    for node in (*proto.graph.node[0].attribute[0].g.node, *proto.graph.node[0].attribute[1].g.node, proto.graph.node[0]):
        node.name = "same"
    names = [n.name for n in Model.from_proto(proto).graph.all_nodes()]
    assert len(set(names)) == len(names) == 4


# errors -------------------------------------------------------------------------------------------


def test_missing_model() -> None:
    with pytest.raises(ModelError, match=r"no model at nowhere\.onnx: check the path"):
        Model.load("nowhere.onnx")


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", b"\x89PNG\r\n\x1a\n" + bytes(200), b'{"json": 1}'])
def test_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a"):
        Model.load(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_model(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = tiny.linear(64).SerializeToString()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelError):
        Model.load(path)


def test_missing_external_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"weights file m\.data is missing; put it beside the model"):
        Model.load(path)


@pytest.mark.parametrize("build", [tiny.linear, tiny.branches])
def test_truncated_external_file(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    path = external(tmp_path, build())
    os.truncate(tmp_path / "m.data", 10)
    with pytest.raises(ModelError, match=r"weights file m\.data is truncated; copy it again"):
        Model.load(path)


def test_truncated_external_file_without_a_stated_length(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        kept = [e for e in tensor.external_data if e.key != "length"]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    path.write_bytes(proto.SerializeToString())
    os.truncate(tmp_path / "m.data", 10)
    with pytest.raises(ModelError, match="truncated"):
        Model.load(path)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "link.data"])
def test_external_file_outside_the_folder_is_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(1000))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    path = external(folder)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        Model.load(path)


def test_too_new_opset(tmp_path: Path) -> None:
    proto = tiny.linear()
    proto.opset_import[0].version = 99
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="uses opset 99"):
        Model.load(tmp_path / "m.onnx")


def test_dangling_read_and_empty_graph(tmp_path: Path) -> None:
    proto = tiny.linear()
    proto.graph.node[0].input[0] = "ghost"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="reads 'ghost', which nothing makes"):
        Model.load(tmp_path / "m.onnx")
    del proto.graph.node[:]
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="empty graph"):
        Model.load(tmp_path / "m.onnx")


# saving -------------------------------------------------------------------------------------------


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("threshold", [model_module.EXTERNAL_BYTES, 0])
@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    broken: str, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "EXTERNAL_BYTES", threshold)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    monkeypatch.setattr(os, broken, _full_disk)
    with pytest.raises(ModelError, match="No space left on device; free some space or choose another place"):
        Model.from_proto(tiny.linear(64)).save(out)
    assert os.listdir(tmp_path) == ["out.onnx"]
    assert out.read_bytes() == b"old"


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its folder does not exist; create it first"):
        Model.from_proto(tiny.linear()).save(tmp_path / "no" / "out.onnx")


@pytest.mark.parametrize("build", [lambda: tiny.linear(64), tiny.branches])
def test_large_weights_go_to_one_content_named_file(
    build: Callable[[], onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "EXTERNAL_BYTES", 0)
    model = Model.from_proto(build())
    out = model.save(tmp_path / "out.onnx")
    files = sorted(os.listdir(tmp_path))
    assert model.save(out) == out and sorted(os.listdir(tmp_path)) == files
    back = Model.load(out)
    assert back.digest() == model.digest()
    assert {p.suffix for p in map(Path, files)} <= {".onnx", ".data"} and len(files) <= 2


def test_external_weights_are_read_by_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "EXTERNAL_BYTES", 0)
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    proto = tiny.linear(64)
    out = Model.from_proto(proto).save(tmp_path / "out.onnx")
    assert any(p.suffix == ".data" for p in tmp_path.iterdir())
    assert tiny.run(out, {"x": x}).tobytes() == tiny.run(proto, {"x": x}).tobytes()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [Model.from_proto(tiny.branches()).save(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_stay_mapped(tmp_path: Path) -> None:
    model = Model.load(external(tmp_path, tiny.linear(128)))
    model.name_nodes()
    weights = model.clone().graph.initializers
    assert isinstance(weights["w"].const_value, ir.ExternalTensor)
    assert isinstance(weights["bias"].const_value, ir.Tensor), "a shape must be known to shape inference"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_while_saving_leaves_no_output(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.ir import tiny\nfrom qcompile.ir.model import Model\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Model.from_proto(tiny.linear()).save(Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.onnx")], cwd=root, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out.onnx").exists()


# digest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.linear, tiny.branches])
def test_digest_is_the_same_however_the_weights_are_stored(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    raw, typed = build(), build()
    for tensor in typed.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, array.ravel()))
    reordered = build()
    reordered.graph.initializer.reverse()
    models = [Model.from_proto(p) for p in (raw, typed, reordered)]
    models.append(Model.load(external(tmp_path, build())))
    models.append(Model.load(models[0].save(tmp_path / "out.onnx")))
    assert len({m.digest() for m in models}) == 1


@pytest.mark.parametrize("change", ["weight", "branch weight", "constant", "operator", "attribute"])
def test_digest_sees_every_change(change: str) -> None:
    proto = tiny.branches()
    before = Model.from_proto(proto).digest()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "u"))
    then, other = (a.g for a in sorted(proto.graph.node[0].attribute, key=lambda a: a.name == "else_branch"))
    match change:
        case "weight":
            pass
        case "branch weight":
            then.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), "w"))
        case "constant":
            other.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32)))
        case "operator":
            other.node[1].op_type = "Sub"
        case _:
            other.node[0].attribute[0].CopyFrom(helper.make_attribute("value_floats", [2.0] * 4))
    if change != "weight":
        del proto.graph.initializer[:]
    assert Model.from_proto(proto).digest() != before
