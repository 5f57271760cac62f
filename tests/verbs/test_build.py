"""From a Q/DQ model to an engine: what is refused before the build, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import psutil
import pytest

from qcompile.backend import options, tensorrt
from qcompile.backend.tensorrt import build_engine
from qcompile.cli import main
from qcompile.errors import BackendError, BuildError, ModelError, UsageError
from qcompile.verbs import build as engine
from qcompile.verbs.build import make_engine, profiles_from, require_engine
from tests.backend.chains import chain
from tests.target.graphs import Form, attention, single

CLI = [sys.executable, "-m", "qcompile"]
FP8 = Form(op="MatMul", activation="float8e4m3fn", weight="float8e4m3fn")


def saved(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "m.onnx", attention())


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (engine, options, tensorrt):
        monkeypatch.setattr(room, "local_gpu", lambda: None)
    monkeypatch.setattr(engine, "require_trt", lambda target: target)
    monkeypatch.setattr(tensorrt, "require_trt", lambda target: target)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_types_without_kernels_are_refused_before_the_build(no_gpu: None, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", single(FP8))
    with pytest.raises(BackendError, match=r"m\.onnx: float8e4m3fn needs sm89 or newer, sm86 has no such kernels") as caught:
        make_engine(path, tmp_path / "m.engine", target="rtx", gpus=["sm89", "sm86"])
    assert caught.value.exit_code == 4 and not isinstance(caught.value, BuildError)
    assert files(tmp_path) == ["m.onnx"]


def test_what_is_known_before_the_model_is_there(no_gpu: None, tmp_path: Path) -> None:
    out = tmp_path / "m.engine"
    require_engine("rtx", out, ["sm89"], ["float8e4m3fn"])
    with pytest.raises(BackendError, match=r"sm89 has no float4e2m1 kernels \(they begin with sm120\)"):
        require_engine("rtx", out, ["sm120", "sm89"], ["float4e2m1"])
    with pytest.raises(BackendError, match=r"cannot build for sm90; choose --gpu from sm75"):
        require_engine("rtx", out, ["sm90"])
    with pytest.raises(BackendError, match="this machine's GPU, and there is none; use --target rtx"):
        require_engine("trt", out, ["sm89"])
    with pytest.raises(UsageError, match="create it first"):
        require_engine("rtx", tmp_path / "absent" / "m.engine", ["sm89"])


def test_trt_is_judged_by_this_machine(monkeypatch: pytest.MonkeyPatch, no_gpu: None, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "local_gpu", lambda: "sm86")
    require_engine("trt", tmp_path / "m.engine", ["sm89"], ["int8"])
    with pytest.raises(BackendError, match="sm86 has no float8e4m3fn kernels"):
        require_engine("trt", tmp_path / "m.engine", ["sm89"], ["float8e4m3fn"])


def test_a_refused_option_leaves_nothing(no_gpu: None, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="--strip"):
        build_engine(model, tmp_path / "m.engine", target="rtx", options=options.BuildOptions(strip=True))
    assert files(tmp_path) == ["m.onnx"]


def test_an_engine_is_no_model(no_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"vtrt" + bytes(100))
    with pytest.raises(ModelError, match=r"m\.engine is an engine, not an ONNX model; give the ONNX file"):
        make_engine(path, tmp_path / "n.engine", target="rtx", gpus=["sm89"])


def test_a_folder_that_cannot_be_written(no_gpu: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UsageError, match=r"cannot write into .*Permission denied; choose another place"):
        build_engine(model, tmp_path / "m.engine", target="rtx")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-o", "absent/m.engine"), 2, "does not exist"),
        (("-o", "."), 2, "is a folder"),
        (("-o", "m.onnx"), 2, "would overwrite m.onnx"),
        (("-o", "m.engine", "--gpu", "hopper"), 2, "'hopper' is not a GPU name"),
        (("-o", "m.engine", "--gpu", "sm90"), 4, "cannot build for sm90"),
        (("-o", "m.engine", "--profile", "x:1xax3"), 2, "is not a list of shapes"),
        (("-o", "m.engine", "--profile", "y:1x3"), 2, "is not an input"),
        (("-o", "m.engine", "--timing-cache", "t"), 4, "no timing cache"),
        (("-o", "m.engine", "--hardware-compatible", "ampere+"), 4, "write --gpu"),
        (("-o", "m.engine", "--hardware-compatible", "volta"), 2, "volta"),
    ],
)
def test_wrong_commands_are_one_message(
    arguments: tuple[str, ...], code: int, said: str, model: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(model.parent)
    assert main(["build", "m.onnx", "--target", "rtx", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and files(model.parent) == ["m.onnx"]


def test_no_bisect(tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise BuildError("no kernel")

    monkeypatch.setattr(engine, "build_engine", refused)
    monkeypatch.setattr(engine, "bisect", lambda *a, **k: pytest.fail("searched"))
    with pytest.raises(BuildError, match=r"^no kernel$"):
        make_engine(saved(tmp_path / "m.onnx", chain({})), tmp_path / "e", target="rtx", gpus=["sm89"], find_cause=False)


@pytest.mark.rtx
def test_profiles_options_and_warnings_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    proto = chain({})
    proto.metadata_props.add(key="qcompile.pipeline", value="canonicalize")
    path, out = saved(tmp_path / "m.onnx", proto), tmp_path / "m.engine"
    made = make_engine(path, out, target="rtx", gpus=["sm86", "sm89"], profiles=profiles_from([]))
    document = json.loads((tmp_path / "m.engine.json").read_text())
    assert document["flags"] == ["STRONGLY_TYPED"] and document["options"]["strip"] is False
    assert document["compiled"] == {"pipeline": "canonicalize"} and document["timing_cache"] is None
    assert set(document["audit"]) == {"sm86", "sm89"} and document["audit"]["sm89"]["share"] == 1.0
    assert document["engine"]["header"] in ("well-formed", "valid", "unsupported_cc")
    assert set(document["versions"]) == {"tensorrt_rtx", "polygraphy", "onnx"}
    assert made.to_json()["options"] == document["options"] and capsys.readouterr() == ("", "")


@pytest.mark.rtx
@pytest.mark.skipif(os.name != "posix", reason="needs a file size limit")
def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, 16 * 1024))

    command = [*CLI, "build", str(model), "-o", str(tmp_path / "m.engine"), "--target", "rtx"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 4 and "cannot write the engine: File too large; free space" in done.stderr
    assert files(tmp_path) == ["m.onnx"]


@pytest.mark.rtx
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_an_interrupt_stops_the_worker_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [*CLI, "build", str(model), "-o", str(tmp_path / "m.engine"), "--target", "rtx"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # background jobs of a shell start deaf to it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **heard) as process:
        started = psutil.Process(process.pid)
        while not (workers := started.children()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in error
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    assert files(tmp_path) == ["m.onnx"]
