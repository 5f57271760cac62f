"""Quantized models as sources: read, completed, lowered again, removed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.execute.opening import open_model
from qcompile.ir.loosen import loosened
from qcompile.ir.model import Model
from qcompile.ir.qoperators import spell_qdq
from qcompile.ir.quantizers import is_quantized
from qcompile.verbs.compile.run import Result, compile
from tests.passes.models import fixture, fixture_arrays
from tests.passes.quantized import SPELLINGS, operators, pictures, tensorflow
from tests.passes.text import read_model

WIDE = """weights seed 0
  w, v, u = normal[64, 64] * 0.1
graph opset=17 (x: FLOAT[N,5,64]) -> (y: FLOAT[N,5,64])
  a = MatMul(x, w) @first
  r = Relu(a) @relu
  b = MatMul(r, v) @second
  t = Relu(b) @again
  y = MatMul(t, u) @last"""
TARGETS = ("ort", "trt", "integer")


def compiled(model: onnx.ModelProto | Model, where: Path, arrays: Any = None, **options: Any) -> Result:
    path = where / "given.onnx"
    Model.from_proto(model).save(path) if isinstance(model, onnx.ModelProto) else model.save(path)
    np.savez(where / "given.calib.npz", **({"x": pictures()} if arrays is None else arrays))
    return compile(path, output=where / "made.onnx", threads=1, **options)


def quantizers(model: onnx.ModelProto) -> Counter[str]:
    """Every Q and DQ with its constants and attributes."""
    constants = {t.name: t.SerializeToString(deterministic=True).replace(t.name.encode(), b"") for t in model.graph.initializer}
    nodes = [(n, [constants.get(i) for i in n.input]) for n in model.graph.node if "uantize" in n.op_type]
    return Counter(f"{n.op_type} {held} {sorted((a.name, a.i) for a in n.attribute)}" for n, held in nodes)


def scales(result: Result) -> set[float]:
    """Of activations."""
    arrays = [numpy_helper.to_array(t) for t in onnx.load(result.output).graph.initializer]
    return {float(a) for a in arrays if a.ndim == 0 and a.dtype == np.float32}


def exact_db(result: Result) -> float:
    """Of the last lowering, in exact arithmetic: kernels of CPUs without VNNI saturate."""
    assert result.compared is not None and result.compared.sqnr_db is not None
    return result.compared.sqnr_db


def said(result: Result, name: str) -> list[str]:
    return [r.reason for r in result.remarks if r.pass_name == name]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_read_for_every_target(name: str, target: str, tmp_path: Path) -> None:
    result = compiled(SPELLINGS[name](), tmp_path, target=target)
    assert result.reference == "the imported quantized model" and result.given == "quantized model"
    assert exact_db(result) > 24 and result.float_db is not None
    assert not [r for r in result.remarks if r.pass_name == "import-qdq" and r.kind == "missed"]


@pytest.mark.parametrize("name", ["operators", "tensorflow"])
def test_what_the_target_can_hold_stays_bit_for_bit(name: str, tmp_path: Path) -> None:
    """u8 and i8 with zero points are ONNX Runtime's own: the outputs are those of the source, computed exactly."""
    result = compiled(SPELLINGS[name](), tmp_path, target="ort")
    assert exact_db(result) == 200.0


@pytest.mark.parametrize(
    ("target", "scheme"),
    [("ort", "w8a8"), ("trt", "w8a8"), ("trt", "fp8"), ("ort", "w4a4"), ("trt", "w4a16"), ("trt", "nvfp4"), ("trt", "mxfp8")],
)
def test_our_own_output_comes_back_as_it_is(target: str, scheme: str, tmp_path: Path) -> None:
    """The same operators, codes, scales and zero points; narrow integers need their scheme's name."""
    if scheme in ("nvfp4", "mxfp8"):
        arrays, model = {"x": np.random.default_rng(0).normal(size=(12, 5, 64)).astype(np.float32)}, read_model(WIDE).model
    else:
        arrays, model = fixture_arrays("block"), fixture("block")
    first = onnx.load(compiled(model, tmp_path, arrays, target=target, scheme=scheme).output)
    again = {"scheme": scheme} if scheme == "w4a4" else {}
    result = compiled(first, tmp_path, arrays, target=target, **again)
    second = onnx.load(result.output)
    assert result.scheme == scheme and exact_db(result) == 200.0
    assert Counter(n.op_type for n in first.graph.node) == Counter(n.op_type for n in second.graph.node)
    assert quantizers(first) == quantizers(second)


def test_operators_on_codes_are_what_their_kernels_compute() -> None:
    """ONNX Runtime's kernels and the Q/DQ that they are read as differ by a code of the output at most."""
    proto, x = operators(), pictures()
    spelled = Model.from_proto(proto)
    assert len(spell_qdq(spelled)) == 5
    kernels = open_model(Model.from_proto(proto), exact=True, threads=1).run(None, {"x": x})[0]
    read = open_model(spelled, exact=True, threads=1).run(None, {"x": x})[0]
    assert np.abs(kernels - read).max() <= 6 / 255 * 1.01


def test_without_rounding_the_limits_of_codes_stay() -> None:
    """A hidden Relu is one of them."""
    x = pictures()
    loose = open_model(loosened(Model.from_proto(operators())), exact=True, threads=1).run(None, {"x": x})[0]
    exact = open_model(Model.from_proto(operators()), exact=True, threads=1).run(None, {"x": x})[0]
    assert 0 < np.abs(loose - exact).max() < 0.1 * np.abs(exact).max()


def test_a_float_layer_is_completed_and_the_others_keep_their_scales(tmp_path: Path) -> None:
    proto = tensorflow()
    for node in proto.graph.node:  # the depthwise layer in float
        if node.name == "Conv_d":
            node.input[1] = "dw"
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 1, 3, 3), np.float32), "dw"))
    result = compiled(proto, tmp_path, target="ort")
    assert "weight dw in int8" in said(result, "annotate")
    assert {float(np.float32(8 / 255)), float(np.float32(6 / 255))} <= scales(result)
    assert any("imported" in reason for reason in said(result, "bias-correct"))


def test_a_zero_point_becomes_a_symmetric_range_where_it_must(tmp_path: Path) -> None:
    result = compiled(tensorflow(), tmp_path, target="trt")
    assert any(r.endswith("uint8 with a zero point is not for trt w8a8; its range in int8") for r in said(result, "import-qdq"))
    zeros = [t for t in onnx.load(result.output).graph.initializer if "zero_point" in t.name]
    assert all(not numpy_helper.to_array(t).any() for t in zeros)


def test_dequantize_leaves_the_float_model(tmp_path: Path) -> None:
    result = compiled(SPELLINGS["brevitas"](), tmp_path, target="ort", passes="dequantize")
    model = Model.load(result.output)
    assert not is_quantized(model.graph) and result.passes[-1].spec == "dequantize"
    again = compiled(SPELLINGS["brevitas"](), tmp_path, target="ort", passes="dequantize,smooth")
    assert again.pipeline.split(",")[-1] == "insert-qdq" and "import-qdq" not in again.pipeline


def test_requantize_chooses_every_scale_anew(tmp_path: Path) -> None:
    imported = {float(np.float32(top)) for top in (4 / 127, 5 / 255, 3 / 255)}
    kept = scales(compiled(SPELLINGS["brevitas"](), tmp_path, target="ort"))
    result = compiled(SPELLINGS["brevitas"](), tmp_path, target="ort", requantize=True)
    assert result.reference == "the float model" and "dequantize" in result.pipeline
    assert imported <= kept and not imported & scales(result)


def test_our_own_output_made_float_can_be_compiled_again(tmp_path: Path) -> None:
    """What it went through before does not count."""
    arrays = fixture_arrays("block")
    ours = onnx.load(compiled(fixture("block"), tmp_path, arrays, target="ort").output)
    floats = onnx.load(compiled(ours, tmp_path, arrays, target="ort", passes="dequantize").output)
    assert compiled(floats, tmp_path, arrays, target="ort", passes="").pipeline.endswith("insert-qdq")


def test_another_scheme_undoes_what_it_has_no_codes_for(tmp_path: Path) -> None:
    result = compiled(SPELLINGS["brevitas"](), tmp_path, target="trt", scheme="fp16")
    assert not is_quantized(Model.load(result.output).graph)
    assert "fp16 quantizes nothing: the import is undone" in said(result, "import-qdq")


def with_blocks() -> onnx.ModelProto:
    """com.microsoft MatMulNBits in front of a float layer."""
    rng = np.random.default_rng(0)
    codes = numpy_helper.from_array(rng.integers(0, 256, (64, 1, 16)).astype(np.uint8), "codes")
    arrays = {"scales": np.full(64, 0.05), "w": rng.normal(0, 0.12, (64, 64)), "v": rng.normal(0, 0.12, (64, 32))}
    weights = [codes, *(numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())]
    blocks = {"domain": "com.microsoft", "K": 32, "N": 64, "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["m"], name="blocks", **blocks),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["b"], name="plain"),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="last"),
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 12, k]) for n, k in (("x", 32), ("y", 32))]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=opsets, ir_version=8)


def test_scales_of_run_time_stay_and_the_rest_is_quantized(tmp_path: Path) -> None:
    arrays = {"x": np.random.default_rng(1).normal(size=(12, 12, 32)).astype(np.float32)}
    result = compiled(with_blocks(), tmp_path, arrays, target="ort")
    operators_made = Counter(n.op_type for n in onnx.load(result.output).graph.node)
    assert operators_made["MatMulNBits"] == 1 and operators_made["DequantizeLinear"] >= 2
    with pytest.raises(ModelError, match=r"target trt has no operator for blocks \(MatMulNBits\); start from the float model"):
        compiled(with_blocks(), tmp_path, arrays, target="trt")


def test_integers_alone_cannot_be_read_back(tmp_path: Path) -> None:
    made = compiled(SPELLINGS["brevitas"](), tmp_path, target="integer")
    with pytest.raises(ModelError, match="computes with integers alone"):
        compiled(onnx.load(made.output), tmp_path, target="ort")
