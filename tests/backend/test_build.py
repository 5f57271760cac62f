"""Engines: build, manifest, and the failures a user can meet."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompile.backend import tensorrt
from qcompile.backend.manifest import write_manifest
from qcompile.backend.options import BuildOptions
from qcompile.backend.process import MODULES
from qcompile.backend.profile import parse_profile
from qcompile.backend.tensorrt import build_engine, capability
from qcompile.errors import BackendError, BuildError, ModelError, UsageError
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
        build_engine(model, tmp_path / "e", target="rtx")
    assert caught.value.exit_code == 4


def test_broken_module(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "rtx", "tests.backend.broken")
    with pytest.raises(BackendError, match=r"does not load.*libnvinfer\.so\.11.*reinstall"):
        build_engine(model, tmp_path / "m.engine", target="rtx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


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


def pretended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The `tensorrt` builder, played: it writes an engine and adds a line to the timing cache."""
    seen: list[dict[str, object]] = []

    def ask(module: str, request: dict[str, Any], target: str) -> dict[str, Any]:
        seen.append(request)
        Path(request["out"]).write_bytes(b"ptrt")
        if request["options"]["timing_cache"]:
            with open(request["options"]["timing_cache"], "ab") as file:
                file.write(b"line\n")
        return {"ok": True, "version": "11.0", "seconds": 1.0, "size": 4, "layers": "", "header": None}

    monkeypatch.setattr(tensorrt, "require_trt", lambda target: "tensorrt")
    monkeypatch.setattr(tensorrt, "ask_worker", ask)
    monkeypatch.setattr(tensorrt, "local_gpu", lambda: "sm90")
    return seen


def test_trt_options_reach_the_worker_and_the_manifest(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, cache = pretended(monkeypatch), tmp_path / "t.cache"
    options = BuildOptions(cache, True, "same-cc", strip=True)
    for lines in (1, 2):
        made = build_engine(model, tmp_path / "m.engine", target="trt", gpus=("sm89",), options=options).manifest
        assert cache.read_bytes() == b"line\n" * lines
    assert seen[0]["module"] == "tensorrt" and seen[0]["capabilities"] == [] and seen[0]["rtx"] is False
    assert made["compute_capabilities"] == ["sm90"] and made["backend"] == "tensorrt"
    assert made["flags"] == ["STRONGLY_TYPED", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"]
    assert made["options"]["hardware_compatible"] == "same-cc" and made["options"]["timing_cache"] == "t.cache"
    assert made["timing_cache"] == {"file": "t.cache", "sha256": hashlib.sha256(cache.read_bytes()).hexdigest()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "m.onnx", "t.cache"]


def test_an_engine_is_kept_when_its_timing_cache_is_not(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch)
    options = BuildOptions(tmp_path / "absent" / "t.cache")
    made = build_engine(model, tmp_path / "m.engine", target="trt", options=options)
    assert made.path.is_file() and "was not updated: No such file" in made.warnings[0]
    assert made.manifest["timing_cache"] is None and made.manifest["warnings"] == list(made.warnings)


def test_a_version_without_an_option(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch)
    reply = {"ok": False, "version": "8.6", "errors": [], "unknown": [], "unsupported": ["strip", "hardware_compatible"]}
    monkeypatch.setattr(tensorrt, "ask_worker", lambda *a: reply)
    with pytest.raises(BackendError, match=r"tensorrt 8\.6 has no --strip, --hardware-compatible; drop it"):
        build_engine(model, tmp_path / "m.engine", target="trt")


def test_a_worker_that_dies_is_a_failed_build(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch)

    def die(*args: object) -> None:
        raise BuildError("the tensorrt library crashed (signal 11)")

    monkeypatch.setattr(tensorrt, "ask_worker", die)
    with pytest.raises(BuildError, match=r"crashed \(signal 11\) while building m\.onnx; run `qcompile check`"):
        build_engine(model, tmp_path / "m.engine", target="trt")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
