"""Refitting, on a played module: what is asked of TensorRT, and what a failure leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompile.backend import refit as room
from qcompile.backend.refit import refit, refit_engine
from qcompile.errors import BackendError


class Logger:
    """`trt.ILogger`."""

    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)


def played(monkeypatch: pytest.MonkeyPatch, missing: list[str], parses: bool = True, loads: bool = True) -> list[Any]:
    """A TensorRT whose engines take new weights; returns the calls made of it."""
    calls: list[Any] = []
    config = SimpleNamespace(clear_flag=lambda flag: calls.append(("clear", flag)))
    engine = SimpleNamespace(create_serialization_config=lambda: config, serialize_with_config=lambda c: b"ptrt whole")
    refitter = SimpleNamespace(get_missing_weights=lambda: missing, refit_cuda_engine=lambda: True)
    module = SimpleNamespace(
        __version__="11.0",
        ILogger=Logger,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if loads else None),
        Refitter=lambda e, logger: refitter,
        OnnxParserRefitter=lambda r, logger: SimpleNamespace(refit_from_file=lambda path: calls.append(path) or parses),
        SerializationFlag=SimpleNamespace(EXCLUDE_WEIGHTS="weights"),
    )
    monkeypatch.setitem(sys.modules, "played_trt", module)  # type: ignore[arg-type]

    def ask(name: str, request: dict[str, Any], target: str) -> dict[str, Any]:
        reply: dict[str, Any] = {"ok": False, "version": "", "errors": []}
        refit({**request, "module": "played_trt"}, reply)
        return json.loads(json.dumps(reply))

    monkeypatch.setattr(room, "local_gpu", lambda: "sm89")
    monkeypatch.setattr(room, "require_trt", lambda target: "tensorrt")
    monkeypatch.setattr(room, "ask_worker", ask)
    return calls


@pytest.fixture
def stripped(tmp_path: Path) -> Path:
    path = tmp_path / "s.engine"
    path.write_bytes(b"ptrt")
    path.with_name("s.engine.json").write_text(json.dumps({"target": "trt", "flags": ["STRIP_PLAN"], "engine": {"size": 4}}))
    path.with_name("m.onnx").write_bytes(b"model")
    return path


def test_the_engine_gets_its_weights_back(stripped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, out = played(monkeypatch, []), stripped.with_name("w.engine")
    manifest = json.loads(refit_engine(stripped, stripped.with_name("m.onnx"), out).read_text())
    assert out.read_bytes() == b"ptrt whole" and ("clear", "weights") in calls
    assert calls[0] == str(stripped.with_name("m.onnx"))
    assert manifest["flags"] == ["STRIP_PLAN"] and manifest["engine"]["size"] == 10
    assert manifest["refitted_from"]["file"] == "m.onnx"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"missing": ["w1", "w2"]}, r"\(it lacks w1, w2\)"),
        ({"missing": [], "parses": False}, "cannot refit s.engine with m.onnx"),
        ({"missing": [], "loads": False}, "cannot refit s.engine with m.onnx"),
    ],
)
def test_a_refusal_leaves_nothing(how: dict[str, Any], said: str, stripped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, **how)
    before = sorted(stripped.parent.iterdir())
    with pytest.raises(BackendError, match=said + r".*must be built with --refit or --strip"):
        refit_engine(stripped, stripped.with_name("m.onnx"), stripped.with_name("w.engine"))
    assert sorted(stripped.parent.iterdir()) == before
