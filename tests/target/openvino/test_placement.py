"""OpenVINO's placement: what is quantized, in which type, and that the plugin computes it in 8 bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.decide.decisions import decisions
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.target.check import check
from tests.passes.models import built, fixture, fixture_arrays
from tests.passes.running import context, pipeline, prefix, run_passes

node = helper.make_node


def random(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * 0.2).astype(np.float32)


def residual() -> Model:
    """x -> Conv -> Relu -> {Conv -> Add}, MaxPool, Conv, GlobalAveragePool, Gemm -> y."""
    constants = {f"w{i}": random(16, 16, 3, 3) for i in range(3)} | {"fc": random(16, 10), "flat": np.array([0, -1])}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1] * 4),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1"], ["c1"], name="body", pads=[1] * 4),
        node("Add", ["c1", "r0"], ["s"], name="add"),
        node("Relu", ["s"], ["r1"], name="relu1"),
        node("MaxPool", ["r1"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w2"], ["c2"], name="last", pads=[1] * 4),
        node("GlobalAveragePool", ["c2"], ["g"], name="average"),
        node("Reshape", ["g", "flat"], ["v"], name="reshape"),
        node("Gemm", ["v", "fc"], ["y"], name="head"),
    ]
    return built(nodes, ["N", 16, 16, 16], constants)


def decided(model: Model, arrays: dict[str, Any], passes: str = "annotate", **options: Any) -> dict[tuple[str, int], str]:
    """(node, slot) -> code type."""
    ctx = context("openvino", **options)
    (annotate,) = registry.parse(passes)
    after, _ = run_passes(model, [*prefix(annotate, ctx), annotate], arrays, ctx)
    return {(str(n.name), slot): d.spec.qtype.name for n, slot, d in decisions(after.graph)}


def test_a_convolution_net_is_quantized_through() -> None:
    found = decided(residual(), {"x": random(8, 16, 16, 16)})
    layers = {(name, slot): kind for name in ("stem", "body") for slot, kind in ((0, "uint8"), (1, "int8"))}
    sums = {("add", 0): "uint8", ("add", 1): "uint8"}
    pools = {("pool", 0): "uint8", ("last", 1): "int8", ("average", 0): "uint8"}
    assert found == {**layers, **sums, **pools}


def test_selectors_are_obeyed() -> None:
    arrays = {"x": random(8, 16, 16, 16)}
    assert not {k for k in decided(residual(), arrays, keep_float=("body", "add")) if k[0] in ("body", "add")}
    assert ("head", 1) in decided(residual(), arrays, quantize=("head",))


def test_attention_is_signed_and_probabilities_are_not() -> None:
    name = "timm_vit_shared_ts17"
    found = decided(fixture(name), fixture_arrays(name))
    products = Counter(tuple(found[n, i] for i in (0, 1)) for n, _ in found if (n, 1) in found and found[n, 0] == found[n, 1])
    assert products["int8", "int8"]
    left = decided(fixture(name), fixture_arrays(name), "annotate{attention=none}")
    gone = found.keys() - left.keys()
    assert left.keys() < found.keys() and Counter(found[k] for k in gone) == {"int8": 3 * len(gone) // 4, "uint8": len(gone) // 4}


def test_the_plugin_computes_in_8_bit(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    compiled, _ = pipeline("", residual(), {"x": random(8, 16, 16, 16)}, context("openvino"))
    compiled.save(tmp_path / "m.onnx")
    assert not check(tmp_path / "m.onnx", "openvino")
    core = ov.Core()
    read = core.read_model(tmp_path / "m.onnx")
    read.reshape({"x": [1, 16, 16, 16]})
    ran = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model().get_ops()
    info = [n.get_rt_info() for n in ran]
    kinds = Counter((i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in info)
    assert kinds["Convolution", "u8"] == 3 and not kinds["Convolution", "f32"]
    assert kinds["Pooling", "u8"] == kinds["Reduce", "u8"] == 1
    assert {ran for kind, ran in kinds if kind == "Eltwise"} <= {"u8"}  # the sum, where it is not part of a convolution
