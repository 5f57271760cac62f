from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.errors import InputError, ModelError
from qcompile.runtime import session as runtime
from qcompile.runtime.session import make_session, meaningful_line, providers, run_batches, session_options


class Batches:
    """Rows 0..6 of a [7, 4] array, with an extra array that the model does not take."""

    def batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        x = np.arange(28, dtype=np.float32).reshape(7, 4)
        for i in range(0, 7, size):
            yield {"x": x[i : i + size], "other": x[i : i + size]}


def model(width: int = 4) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, ["N", width])],
        [helper.make_tensor_value_info(n, T.FLOAT, ["N", width]) for n in ("y", "z")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def weight_only() -> bytes:
    """DequantizeLinear (block-wise int4) -> MatMul: what ONNX Runtime fuses into MatMulNBits."""
    rng = np.random.default_rng(0)
    codes = helper.make_tensor("w", T.INT4, [64, 32], rng.integers(-8, 8, 64 * 32))
    scale = numpy_helper.from_array(rng.uniform(0.01, 1, (2, 32)).astype(np.float32), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", T.FLOAT, [3, 32])],
        [codes, scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_run_batches_keeps_order_and_picks_outputs() -> None:
    batches = list(run_batches(make_session(model()), Batches(), 3, outputs=["z"]))
    assert [len(b[0]) for b in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), -np.arange(28).reshape(7, 4))


def test_failing_batch_is_named() -> None:
    session = make_session(model(width=5))
    with pytest.raises(InputError, match=r"starts at sample 0: .*Got: 4 Expected: 5.*check the values") as caught:
        list(run_batches(session, Batches(), 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not onnx", model()[:-20]])
def test_load_failure_is_one_line(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(content)
    for source in (content, file):
        with pytest.raises(ModelError, match="ONNX Runtime cannot load the model") as caught:
            make_session(source)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_file() -> None:
    with pytest.raises(ModelError, match="exist"):
        make_session("/nowhere/model.onnx")


def test_pinned_options() -> None:
    options = session_options(qdq_fusion=False, threads=1, extra={"session.intra_op.allow_spinning": "1"})
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_weight_only_matmul_keeps_float_activations() -> None:
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    exact = make_session(weight_only(), optimize="off", threads=1).run(None, {"x": x})[0]
    fused = make_session(weight_only(), threads=1).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.asarray(fused), np.asarray(exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : it broke.", "it broke"),
        ("[ONNXRuntimeError] : 2 : X : first\n Please fix either the inputs/outputs or the model.", "first"),
        ("", "RuntimeError"),
        ("/a/b/core/graph.cc:12 onnxruntime::Graph::Resolve(int) const no such node\nStacktrace:\n#1 0x00", "no such node"),
    ],
)
def test_meaningful_line(text: str, line: str) -> None:
    assert meaningful_line(RuntimeError(text)) == line


def test_cuda_is_asked_for_only_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = providers()
    assert found.names[-1] == "CPUExecutionProvider"
    assert (found.reason is None) == (found.names[0] == "CUDAExecutionProvider")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    providers.cache_clear()
    assert providers() == (("CPUExecutionProvider",), "running on the CPU: this onnxruntime has no CUDA provider")
    providers.cache_clear()


def test_a_device_without_libraries_is_no_device(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(runtime, "_cuda_devices", lambda: 1)
    monkeypatch.setattr(runtime, "_load_failure", lambda library: "libcudnn.so.9: no such file")
    providers.cache_clear()
    assert providers().reason == "running on the CPU: the CUDA provider does not load (libcudnn.so.9: no such file)"
    providers.cache_clear()
    assert capfd.readouterr() == ("", "")


def test_the_models_are_valid() -> None:
    onnx.checker.check_model(onnx.load_from_string(weight_only()))
