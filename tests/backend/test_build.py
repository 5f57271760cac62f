"""Engines: build, manifest, and the failures a user can meet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import onnx
import pytest

from qcompile.backend import tensorrt
from qcompile.backend.profile import parse_profile
from qcompile.backend.tensorrt import build_engine, capability, load_trt, write_manifest
from qcompile.errors import BackendError, ModelError, UsageError
from tests.target.graphs import Form, attention, single


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(attention(), str(path))
    return path


@pytest.mark.rtx
def test_engine_and_manifest(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    said: list[str] = []
    out = tmp_path / "m.engine"
    result = build_engine(model, out, target="rtx", gpus=("sm86", "sm89"), progress=said.append)
    assert result.path == out and out.stat().st_size == result.size > 1000
    assert capfd.readouterr() == ("", "") and len(said) == 1
    doc = json.loads((tmp_path / "m.engine.json").read_text())
    assert doc == result.manifest and doc["backend"] == "tensorrt_rtx" and doc["version"] == result.version
    assert doc["compute_capabilities"] == ["sm86", "sm89"]
    assert doc["onnx"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (
        doc["profiles"][0]["shapes"] == {"x": [[1, 64, 128], [8, 64, 128], [32, 64, 128]]}
        and "guessed" in doc["profiles"][0]["source"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "m.onnx"]
    write_manifest(out, {**doc, "audit": {"share": 1.0}})
    assert json.loads(result.manifest_path.read_text())["audit"] == {"share": 1.0}


@pytest.mark.rtx
def test_refused_model_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "bad.onnx"
    onnx.save(single(Form(zero_point=3)), str(path))
    with pytest.raises(BackendError, match=r"bad\.onnx.*Non-zero zero point.*qcompile check"):
        build_engine(path, tmp_path / "bad.engine", target="rtx")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.onnx"]


@pytest.mark.rtx
def test_given_profiles(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    profiles = [parse_profile("x:1x64x128"), parse_profile("x:2x64x128,4x64x128,8x64x128")]
    result = build_engine(model, tmp_path / "m.engine", target="rtx", profiles=profiles)
    assert [p["shapes"]["x"][2] for p in result.manifest["profiles"]] == [[1, 64, 128], [8, 64, 128]]


def test_missing_module_names_the_extra(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'qcompile\[tensorrt\]', or use --target rtx"):
        build_engine(model, tmp_path / "e", target="trt")
    with pytest.raises(BackendError, match=r"pip install 'qcompile\[rtx\]'$") as caught:
        load_trt("rtx")
    assert caught.value.exit_code == 4


def test_broken_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt.MODULES, "rtx", "tests.backend.broken")
    with pytest.raises(BackendError, match="does not load"):
        load_trt("rtx")


def test_usage_errors(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "require_trt", lambda target: "tensorrt_rtx")
    with pytest.raises(UsageError, match="does not exist"):
        build_engine(model, tmp_path / "absent" / "m.engine", target="rtx")
    with pytest.raises(ModelError):
        build_engine(tmp_path / "absent.onnx", tmp_path / "m.engine", target="rtx")
    assert capability("sm89") == (8, 9) and capability("SM120") == (12, 0)
    with pytest.raises(UsageError, match="sm89"):
        capability("hopper")


def test_no_engine_for_ort(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="builds no engine"):
        build_engine(model, tmp_path / "e", target="ort")
