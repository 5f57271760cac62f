from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.errors import InputError, ModelError
from qcompile.execute import session as runtime
from qcompile.execute.session import device_note, make_session, meaningful_line, providers, run, run_batches, session_options


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


class Device:
    """Stands in for `ort.InferenceSession` on a machine with CUDA: `loads` and `runs` say what the device manages."""

    real, loads, runs = ort.InferenceSession, True, True
    asked: ClassVar[list[list[str]]] = []

    def __init__(self, source: Any, options: Any, providers: list[Any], enable_fallback: int) -> None:
        assert enable_fallback == 0  # ONNX Runtime's own prints
        self.names = [p if isinstance(p, str) else p[0] for p in providers]
        Device.asked.append(self.names)
        if "CUDAExecutionProvider" in self.names:
            assert ("CUDAExecutionProvider", {"use_tf32": "0"}) in providers
            if not Device.loads:
                raise RuntimeError("CUDA failure 2: out of memory")
        self.session = Device.real(source, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return self.names

    def set_providers(self, names: list[str]) -> None:
        self.names = names

    def run(self, outputs: Any, feeds: Any) -> Any:
        if "CUDAExecutionProvider" in self.names and not Device.runs:
            raise RuntimeError("CUDA failure 2: out of memory")
        return self.session.run(outputs, feeds)

    def get_inputs(self) -> Any:
        return self.session.get_inputs()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Device]]:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Device)
    monkeypatch.setattr(runtime, "_cuda_devices", lambda: 1)
    monkeypatch.setattr(runtime, "_load_failure", lambda library: None)
    monkeypatch.setattr(Device, "loads", True)
    monkeypatch.setattr(Device, "runs", True)
    providers.cache_clear()
    Device.asked.clear()
    yield Device
    providers.cache_clear()


GPU_FIRST = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_device_that_works_is_used(device: type[Device]) -> None:
    assert providers() == (tuple(GPU_FIRST), None) and device_note() == "running on CUDA"
    assert [len(b[0]) for b in run_batches(make_session(model()), Batches(), 4)] == [4, 3]
    assert device.asked == [GPU_FIRST, GPU_FIRST]  # the probe, and the model


def test_a_device_that_fails_on_the_smallest_model_is_not_asked_again(device: type[Device]) -> None:
    device.loads = False
    why = "running on the CPU: the CUDA provider fails (CUDA failure 2: out of memory)"
    assert providers() == (("CPUExecutionProvider",), why) and device_note() == why
    make_session(model())
    assert device.asked == [GPU_FIRST, ["CPUExecutionProvider"]]


@pytest.mark.parametrize("fails", ["loads", "runs"])
def test_a_model_that_the_device_has_no_room_for_runs_on_the_cpu(
    fails: str, device: type[Device], capfd: pytest.CaptureFixture[str]
) -> None:
    assert providers().reason is None
    setattr(device, fails, False)
    session = make_session(model())
    assert [len(b[0]) for b in run_batches(session, Batches(), 4)] == [4, 3]
    assert session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises((ModelError, InputError), match="out of memory"):  # named by the user: no other
        run(make_session(model(), use=GPU_FIRST), {"x": np.ones((1, 4), np.float32)}, fall_back=False)
    assert capfd.readouterr() == ("", "")


def test_the_models_are_valid() -> None:
    onnx.checker.check_model(onnx.load_from_string(weight_only()))
