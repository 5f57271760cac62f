"""--ort-library and --plugin: code of others, named on the command line only."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.backend import parser
from qcompile.backend.process import plugins
from qcompile.errors import ModelError, UsageError
from qcompile.execute.session import libraries
from qcompile.report import SILENT
from qcompile.verbs.compile.options import Options
from qcompile.verbs.evaluate.run import EvalOptions
from qcompile.verbs.evaluate.run import run as evaluate
from qcompile.verbs.libraries import PluginOptions, load_libraries
from qcompile.verbs.options import made

EXTENSIONS = importlib.util.find_spec("onnxruntime_extensions")


def model(folder: Path) -> Path:
    """A convolution, an operator of onnxruntime-extensions (x -> positive and negative part), a convolution."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32), f"w{i}") for i in range(2)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("NegPos", ["a"], ["n", "p"], name="parts", domain="ai.onnx.contrib"),
        helper.make_node("Conv", ["p", "w1"], ["y"], name="second", pads=[1] * 4),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8, 8, 8]) for n in "xy"]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), folder / "m.onnx")
    np.savez(folder / "m.calib.npz", x=rng.standard_normal((16, 8, 8, 8)).astype(np.float32))
    return folder / "m.onnx"


def test_without_its_library_the_message_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"NegPos.*--ort-library PATH"):
        qcompile.compile(model(tmp_path), target="ort", output=tmp_path / "q.onnx")


@pytest.mark.parametrize("flag", ["ort_library", "plugin"])
def test_a_library_that_is_not_there(tmp_path: Path, flag: str) -> None:
    named: dict[str, Any] = {flag: (str(tmp_path / "none.so"),)}
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}: no library at .*; check the path"):
        qcompile.compile(model(tmp_path), target="ort", output=tmp_path / "q.onnx", **named)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(UsageError, match=r"--ort-library .*cannot load it.*; give a library of custom operators"):
        qcompile.compile(model(tmp_path), target="ort", output=tmp_path / "q.onnx", ort_library=(str(tmp_path / "text.so"),))
    assert libraries() == ()


@pytest.mark.parametrize("key", ["ort-library", "plugin"])
def test_a_file_beside_the_model_names_no_code(tmp_path: Path, key: str) -> None:
    (tmp_path / "m.qcompile.toml").write_text(f'{key} = "evil.so"\n')
    with pytest.raises(UsageError, match=f"unknown key '{key}'"):
        made(Options, {}, model(tmp_path))


@pytest.mark.skipif(not parser.can_parse("rtx") or sys.platform != "linux", reason="tensorrt_rtx is not installed")
def test_workers_load_plugins(tmp_path: Path) -> None:
    known = tmp_path / "relu.onnx"
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), known)
    (tmp_path / "text.so").write_text("no library")
    try:
        load_libraries(PluginOptions(plugin=(str(tmp_path / "text.so"),)))
        assert plugins() and "text.so" in parser.parse(known, "rtx")
    finally:
        load_libraries(PluginOptions())
    assert parser.parse(known, "rtx") == ""


@pytest.mark.skipif(EXTENSIONS is None, reason="onnxruntime-extensions is not installed")
def test_a_custom_operator_goes_through(tmp_path: Path) -> None:
    import onnxruntime_extensions

    library, source = onnxruntime_extensions.get_library_path(), model(tmp_path)
    for target in ("ort", "trt"):
        result = qcompile.compile(source, target=target, output=tmp_path / "q.onnx", ort_library=(library,))
        assert result.compared is not None and (result.compared.sqnr_db or 0) > 25
    asked = EvalOptions(data=str(tmp_path / "m.calib.npz"), ort_library=(library,))
    found = evaluate(source, tmp_path / "q.onnx", asked, SILENT).comparison
    assert found is not None and (found.sqnr_db or 0) > 25
