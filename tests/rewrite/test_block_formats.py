"""NVFP4 and MXFP8: what is emitted, what stays out of blocks, and that it computes what the formula says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.decide.decisions import decisions
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.quant.affine import fake_quant
from qcompile.quant.blockformats import mxfp8_dynamic, mxfp8_qparams, nvfp4_dynamic, nvfp4_qparams
from qcompile.quant.minifloat import e8m0_values
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import SCHEMES, PerBlock
from qcompile.report import PassReport
from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from tests.passes.measures import constants_of, outputs
from tests.passes.models import block, built
from tests.passes.running import context, pipeline, run_passes

LOWER = "canonicalize,opset,annotate,rtn,insert-qdq"
DYNAMIC = {"nvfp4": "TRT_FP4DynamicQuantize", "mxfp8": "TRT_MXFP8DynamicQuantize"}
RNG = np.random.default_rng(2)


def node(op: str, inputs: Sequence[str], out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [out], name=f"{out}_{op}".lower(), **attributes)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def lowered(model: Model, scheme: str, shape: Sequence[int], passes: str = LOWER) -> tuple[Model, list[PassReport], np.ndarray]:
    x = RNG.standard_normal(tuple(shape)).astype(np.float32)
    after, reports = run_passes(model, registry.parse(passes), {"x": x}, context("rtx", scheme))
    return after, reports, x


def linear(k: int = 64, n: int = 48, shape: Sequence[Any] = ("N", 5), w: np.ndarray | None = None) -> Model:
    return built([node("MatMul", ["x", "w"], "y")], [*shape, k], {"w": weight(k, n) if w is None else w})


def convolution() -> Model:
    return built([node("Conv", ["x", "w"], "y")], ["N", 16, 8, 8], {"w": weight(32, 16, 3, 3)})


def ops(model: Model) -> list[str]:
    return [f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph]


def notes(reports: Sequence[PassReport]) -> list[str]:
    return [r.reason for x in reports for r in x.remarks if r.kind == "note"]


def test_schemes_and_opsets() -> None:
    for target in ("trt", "rtx"):
        assert TARGETS[target].opset(SCHEMES["nvfp4"]) == 23
        assert TARGETS[target].opset(SCHEMES["mxfp8"]) == TARGETS[target].opset(SCHEMES["w4a16"]) == 21
        assert TARGETS[target].opset(SCHEMES["fp8"]) == 19
        assert TARGETS[target].capability("float8e4m3fn") == 89
    assert TARGETS["rtx"].capability("float4e2m1") == 120, "TensorRT-RTX has no sm100 target"
    assert not {"nvfp4", "mxfp8", "fp8"} & set(TARGETS["ort"].schemes)


def test_nvfp4_is_written_as_tensorrt_reads_it() -> None:
    model, _, _ = lowered(linear(), "nvfp4", (4, 5, 64))
    assert model.opset == 23 and model.graph.opset_imports["trt"] == 1
    assert sorted(ops(model)) == sorted(["trt::TRT_FP4DynamicQuantize", *["DequantizeLinear"] * 4, "MatMul"])
    by_name = {n.name: n for n in model.graph}
    quantizer, outer = by_name["x_DynamicQuantize"], by_name["w_DequantizeLinear"]
    assert {a: quantizer.attributes[a].as_int() for a in quantizer.attributes} == {
        "axis": -1,
        "block_size": 16,
        "scale_type": int(ir.DataType.FLOAT8E4M3FN),
    }
    assert [o.dtype for o in quantizer.outputs] == [ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN]
    assert (outer.attributes["axis"].as_int(), outer.attributes["block_size"].as_int()) == (0, 16)
    codes, scale = outer.inputs
    assert codes is not None and codes.dtype == ir.DataType.FLOAT4E2M1
    assert scale is not None and (inner := scale.producer()) is not None
    assert [v.dtype for v in inner.inputs if v] == [ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT]
    assert inner.inputs[1] is not None and inner.inputs[1].shape == ()


def test_mxfp8_is_written_as_tensorrt_reads_it() -> None:
    model, _, _ = lowered(linear(), "mxfp8", (4, 5, 64))
    dequantize = "trt::TRT_MXFP8DequantizeLinear"
    assert sorted(ops(model)) == sorted(["trt::TRT_MXFP8DynamicQuantize", dequantize, dequantize, "MatMul"])
    outer = next(n for n in model.graph if n.name == "w_DequantizeLinear")
    assert {a: outer.attributes[a].as_int() for a in outer.attributes} == {"axis": 0, "block_size": 32, "output_dtype": 1}
    assert [v.dtype for v in outer.inputs if v] == [ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8]


@pytest.mark.parametrize("trans_b", [0, 1])
def test_nvfp4_computes_the_formula(trans_b: int) -> None:
    w = weight(48, 64) if trans_b else weight(64, 48)
    w[16:32] = 0 if not trans_b else w[16:32]
    w[:, 16:32] = 0 if trans_b else w[:, 16:32]
    model = built([node("Gemm", ["x", "w"], "y", transB=trans_b)], ["N", 64], {"w": w})
    after, _, x = lowered(model, "nvfp4", (8, 64), LOWER.replace("rtn", "rtn{clip=none}"))
    axis = 1 if trans_b else 0
    wide = fake_quant(w, nvfp4_qparams(w, axis), FLOAT4E2M1, PerBlock(axis, 16))
    tensor_scale = float(constants_of(after)["x_tensor_scale"])
    values, scales = nvfp4_dynamic(x, tensor_scale)
    expected = (values * np.repeat(scales * np.float32(tensor_scale), 16, axis=-1)) @ (wide.T if trans_b else wide)
    np.testing.assert_allclose(outputs(after, {"x": x})[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert (constants_of(after)["w_scale"].astype(np.float32) == 1).any(), "blocks of zeros have scale 1"


def test_mxfp8_computes_the_formula() -> None:
    w = weight(64, 48)
    after, _, x = lowered(linear(w=w), "mxfp8", (4, 5, 64))
    wide = fake_quant(w, mxfp8_qparams(w, 0), FLOAT8E4M3FN, PerBlock(0, 32))
    values, exponents = mxfp8_dynamic(x)
    expected = (values * np.repeat(e8m0_values(exponents), 32, axis=-1)) @ wide
    np.testing.assert_allclose(outputs(after, {"x": x})[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (linear(k=40), (4, 5, 40), "reduction length 40 is no multiple of"),
        (linear(k=16), (4, 5, 16), "reduction length 16"),
        (linear(shape=("N", 3, 5)), (2, 3, 5, 64), "this one is 4-D"),
        (
            built([node("Conv", ["x", "w"], "y")], ["N", 16, 8, 8], {"w": weight(32, 16, 3, 3)}),
            (2, 16, 8, 8),
            "matrix products only",
        ),
    ],
    ids=["odd length", "short", "4-D", "conv"],
)
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_what_blocks_do_not_fit_is_fp8_with_a_remark(scheme: str, model: Model, shape: Sequence[int], reason: str) -> None:
    after, reports, _ = lowered(model, scheme, shape)
    assert not any(n.domain == "trt" for n in after.graph)
    assert {d for n in after.graph if n.op_type == "QuantizeLinear" for d in [n.outputs[0].dtype]} == {ir.DataType.FLOAT8E4M3FN}
    assert any(reason in text and "float8e4m3fn instead of" in text for text in notes(reports))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_one_quantizer_for_one_tensor_and_one_set_of_codes_for_one_weight(scheme: str) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["x", "w"], "b"), node("MatMul", ["x", "v"], "c")]
    nodes += [node("Add", ["a", "b"], "d"), node("Add", ["d", "c"], "y")]
    after, _, _ = lowered(built(nodes, ["N", 5, 64], {"w": weight(64, 48), "v": weight(64, 48)}), scheme, (4, 5, 64))
    assert ops(after).count(f"trt::{DYNAMIC[scheme]}") == 1
    assert len([n for n in constants_of(after) if n.endswith("_quantized")]) == 2


def test_attention_is_fp8_and_says_so() -> None:
    after, reports, _ = lowered(block(), "nvfp4", (4, 5, 16), "canonicalize,opset,split-qkv,annotate,rtn,insert-qdq")
    assert any("attention multiplies 4-D activations" in text for text in notes(reports))
    kinds = {n.outputs[0].dtype for n in after.graph if n.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.FLOAT8E4M3FN}
    assert f"trt::{DYNAMIC['nvfp4']}" in ops(after)


def test_attention_on_a_tensor_in_blocks_stays_float() -> None:
    """A tensor has one quantizer: here x itself is the values of attention."""
    nodes = [
        node("MatMul", ["x", "wq"], "q"),
        node("MatMul", ["x", "wk"], "k"),
        node("Transpose", ["k"], "kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], "s"),
        node("Softmax", ["s"], "p", axis=-1),
        node("MatMul", ["p", "x"], "y"),
    ]
    model = built(nodes, ["N", 6, 64], {"wq": weight(64, 64), "wk": weight(64, 64)})
    after, reports, _ = lowered(model, "nvfp4", (4, 6, 64))
    assert "QuantizeLinear" not in ops(after)
    assert any("a tensor has one quantizer" in r.reason for x in reports for r in x.remarks if r.kind == "missed")


def test_decisions_survive_a_file(tmp_path: Path) -> None:
    x = {"x": RNG.standard_normal((4, 5, 64)).astype(np.float32)}
    half, _ = run_passes(linear(), registry.parse("canonicalize,opset,annotate,rtn"), x, context("rtx", "nvfp4"))
    half.save(tmp_path / "half.onnx")
    again = Model.load(tmp_path / "half.onnx")
    scales = {s: d.qparams.tensor_scale for _, s, d in decisions(again.graph) if d.qparams is not None}
    assert scales.keys() == {0, 1} and None not in scales.values()
    done, _ = run_passes(again, registry.parse("insert-qdq"), x, context("rtx", "nvfp4"))
    direct, _ = run_passes(half, registry.parse("insert-qdq"), x, context("rtx", "nvfp4"))
    assert done.digest() == direct.digest()


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_the_whole_pipeline_is_legal_and_the_capability_is_checked(scheme: str) -> None:
    x = {"x": RNG.standard_normal((4, 5, 64)).astype(np.float32)}
    model, _ = pipeline("", linear(), x, context("rtx", scheme))
    assert not [f for f in check(model.to_proto(), "rtx", ["sm120"]) if f.severity == "error"]
    too_old = "sm89" if scheme == "nvfp4" else "sm86"
    refused = [f for f in check(model.to_proto(), "rtx", [too_old]) if f.severity == "error"]
    assert [f.rule for f in refused] == ["QC-TRT-021"] and too_old in refused[0].message
    slow = [f.rule for f in check(model.to_proto(), "rtx", ["sm120"]) if f.severity == "warning"]
    assert ("QC-TRT-029" in slow) == (scheme == "mxfp8")
