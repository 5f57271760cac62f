"""On a GPU: engines run, agree with ONNX Runtime, and can be refitted.  Skipped without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from qcompile.backend.device import local_gpu
from qcompile.backend.options import BuildOptions
from qcompile.backend.process import MODULES
from qcompile.backend.refit import refit_engine
from qcompile.backend.runner import run_engines
from qcompile.backend.tensorrt import build_engine
from qcompile.target.catalog import TARGETS
from qcompile.verbs.bench.engines import bench_engines
from tests.target.graphs import Form, single

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(local_gpu() is None, reason="no CUDA device")]
FORM = Form(op="MatMul")


@pytest.fixture(params=list(MODULES))
def target(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed")
    if TARGETS[name].gpus and local_gpu() not in TARGETS[name].gpus:
        pytest.skip(f"{MODULES[name]} has no {local_gpu()}")
    return name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(single(FORM), str(path))
    return path


def gpus() -> tuple[str, ...]:
    return (str(local_gpu()),)


def test_an_engine_agrees_with_onnx_runtime_and_its_twin_is_timed(target: str, model: Path, tmp_path: Path) -> None:
    twin = tmp_path / "half.onnx"
    onnx.save(single(FORM.but(activation=None, weight=None)), str(twin))
    engines = [tmp_path / "half.engine", tmp_path / "int8.engine"]
    for source, engine in zip((twin, model), engines, strict=True):
        made = build_engine(source, engine, target=target, gpus=gpus())
        assert made.manifest["engine"]["header"] in ("valid", None)
    document = bench_engines([*engines, model], runs=5).to_json()
    assert document["compared"][1]["sqnr_db"] > 30
    assert all(m["min_ms"] > 0 for m in document["models"])


def test_a_stripped_engine_refits(target: str, model: Path, tmp_path: Path) -> None:
    stripped, whole = tmp_path / "stripped.engine", tmp_path / "whole.engine"
    build_engine(model, stripped, target=target, gpus=gpus(), options=BuildOptions(strip=True))
    refit_engine(stripped, model, whole)
    assert run_engines([whole], runs=1, seed=0).outputs[0]["y"].any()


def test_timing_cache(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    cache = tmp_path / "t.cache"
    for _ in range(2):
        made = build_engine(model, tmp_path / "m.engine", target="trt", options=BuildOptions(timing_cache=cache))
        assert made.manifest["timing_cache"]["file"] == "t.cache" and cache.stat().st_size > 0
