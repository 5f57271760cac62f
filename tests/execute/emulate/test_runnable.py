"""The emulated graphs against the numpy reference, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.quant.affine import quantize
from qcompile.quant.blockformats import mxfp8_dynamic, mxfp8_qparams, nvfp4_dynamic, nvfp4_qparams
from qcompile.quant.minifloat import e8m0_exponents, e8m0_values
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import PerBlock

Array = NDArray[Any]
FLOAT, HALF, FP8, FP4 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
NUMPY: dict[int, Any] = {FLOAT: np.float32, HALF: np.float16}
RNG = np.random.default_rng(1)


def rows(rank: int = 3) -> Array:
    """[.., 64]: 2 * 10^5 values over forty octaves, with blocks of zeros, ties, saturated and subnormal ones."""
    x = RNG.standard_normal((3200, 64)) * np.exp2(RNG.uniform(-20, 4, (3200, 1)))
    x[:40] = RNG.integers(-24, 25, (40, 64)) / 4 * np.exp2(np.arange(-20, 20))[:, None]
    x[40:42] = 0
    x[42, :16] = 0
    x[43] *= 1e6
    x[44] = 1e-42
    x[45] = -0.0
    return x.reshape(*[2] * (rank - 2), -1, 64).astype(np.float32)


def model_of(nodes: list[NodeProto], constants: dict[str, Any], dtype: int, shape: list[Any], outs: dict[str, int]) -> Model:
    tensors = [t if isinstance(t, TensorProto) else numpy_helper.from_array(np.asarray(t), n) for n, t in constants.items()]
    x = [helper.make_tensor_value_info("x", dtype, shape)] if shape else []
    ends = [helper.make_tensor_value_info(n, t, None) for n, t in outs.items()]
    graph = helper.make_graph(nodes, "g", x, ends, tensors)
    proto: ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)], ir_version=11
    )
    return Model.from_proto(proto)


def trt(op_type: str, inputs: list[str], outputs: list[str], axis: int = -1, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, name=f"{outputs[0]}_node", domain="trt", axis=axis, **attributes)


def run(model: Model, feeds: dict[str, Array], optimize: Any = "off") -> list[Array]:
    ready = runnable(model)
    assert ready is not model
    assert all(n.domain == "" for n in ready.graph)
    data = ready.to_proto().SerializeToString()
    return [np.asarray(a) for a in make_session(data, optimize=optimize, qdq_fusion=False, threads=1).run(None, feeds)]


def fp4_chain(scale_dtype: Any, tensor_scale: float, dtype: int, shape: list[Any]) -> Model:
    nodes = [
        trt("TRT_FP4DynamicQuantize", ["x", "s"], ["x4", "x8"], block_size=16, scale_type=FP8),
        helper.make_node("DequantizeLinear", ["x8", "s"], ["xs"], name="inner"),
        helper.make_node("DequantizeLinear", ["x4", "xs"], ["y"], name="outer", axis=-1, block_size=16),
    ]
    return model_of(
        nodes, {"s": np.asarray(tensor_scale, scale_dtype)}, dtype, shape, {"y": FLOAT if scale_dtype is np.float32 else HALF}
    )


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("tensor_scale", [2.0**-8, 0.013, 1e-4])
def test_dynamic_nvfp4_equals_the_reference(tensor_scale: float, rank: int) -> None:
    x = rows(rank)
    values, scales = nvfp4_dynamic(x, tensor_scale)
    expected = values * np.repeat(scales * np.float32(tensor_scale), 16, axis=-1)
    shape: list[Any] = [*[None] * (rank - 1), 64]
    for level in ("off", "all"):
        np.testing.assert_array_equal(run(fp4_chain(np.float32, tensor_scale, FLOAT, shape), {"x": x}, level)[0], expected)


def test_dynamic_nvfp4_in_float16() -> None:
    """DequantizeLinear rounds to its scale's type, the quantizer computes in float32."""
    x, tensor_scale = np.clip(rows(), -6e4, 6e4).astype(np.float16), float(np.float16(0.0131))
    values, scales = nvfp4_dynamic(x, tensor_scale)
    inner = (scales * np.float32(tensor_scale)).astype(np.float16).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = (values * np.repeat(inner, 16, axis=-1)).astype(np.float16)
    np.testing.assert_array_equal(run(fp4_chain(np.float16, tensor_scale, HALF, [None, None, 64]), {"x": x})[0], expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_fp4_weights_equal_their_int8_form(dtype: int, axis: int) -> None:
    w = (RNG.standard_normal((64, 96)) * 0.02).astype(np.float32)
    params = nvfp4_qparams(w, axis)
    assert params.tensor_scale is not None
    codes = quantize(w, params, FLOAT4E2M1, PerBlock(axis, 16))
    stored = (params.scale / params.tensor_scale).astype(np.float32)
    constants = {
        "w": numpy_helper.from_array(codes, "w"),
        "s8": helper.make_tensor("s8", FP8, stored.shape, stored.ravel()),
        "s": np.asarray(params.tensor_scale, NUMPY[dtype]),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["s8", "s"], ["ws"], name="inner"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="outer", axis=axis, block_size=16),
        helper.make_node("Add", ["x", "wd"], ["y"], name="read"),
    ]
    got = run(model_of(nodes, constants, dtype, [64, 96], {"y": dtype}), {"x": np.zeros((64, 96), NUMPY[dtype])})[0]
    inner = (stored * np.float32(params.tensor_scale)).astype(NUMPY[dtype]).astype(np.float32)
    expected = (codes.astype(np.float32) * np.repeat(inner, 16, axis=axis)).astype(NUMPY[dtype])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rank", [2, 3])
def test_dynamic_mxfp8_equals_the_reference(rank: int, dtype: int) -> None:
    with np.errstate(over="ignore"):
        x = np.clip(rows(rank), -6e4, 6e4).astype(NUMPY[dtype])
    nodes = [
        trt("TRT_MXFP8DynamicQuantize", ["x"], ["x8", "e"], block_size=32, output_dtype=FP8),
        trt("TRT_MXFP8DequantizeLinear", ["x8", "e"], ["y"], block_size=32, output_dtype=dtype),
        helper.make_node("Identity", ["e"], ["codes"], name="expose"),
    ]
    shape: list[Any] = [*[None] * (rank - 1), 64]
    model = model_of(nodes, {}, dtype, shape, {"y": dtype, "codes": TensorProto.UINT8})
    values, exponents = mxfp8_dynamic(x)
    expected = (values.astype(np.float64) * np.repeat(e8m0_values(exponents), 32, axis=-1)).astype(NUMPY[dtype])
    for level in ("off", "all"):
        y, codes = run(model, {"x": x}, level)
        np.testing.assert_array_equal(codes, exponents)
        np.testing.assert_array_equal(y, expected)


def test_mxfp8_weights_equal_the_reference() -> None:
    w = (RNG.standard_normal((64, 48)) * np.exp2(RNG.uniform(-20, 10, 48))).astype(np.float32)
    params = mxfp8_qparams(w, 0)
    codes = quantize(w, params, FLOAT8E4M3FN, PerBlock(0, 32))
    amax = np.abs(w.reshape(2, 32, 48)).max(1)
    constants = {"w": numpy_helper.from_array(codes, "w"), "e": e8m0_exponents(amax)}
    nodes = [
        trt("TRT_MXFP8DequantizeLinear", ["w", "e"], ["wd"], axis=0, block_size=32, output_dtype=FLOAT),
        helper.make_node("Add", ["x", "wd"], ["y"], name="read"),
    ]
    got = run(model_of(nodes, constants, FLOAT, [64, 48], {"y": FLOAT}), {"x": np.zeros((64, 48), np.float32)})[0]
    np.testing.assert_array_equal(got, codes.astype(np.float32) * np.repeat(params.scale.astype(np.float32), 32, axis=0))


def test_a_model_without_such_operators_is_answered_as_it_is() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"], name="relu")], {}, FLOAT, [2, 4], {"y": FLOAT})
    assert runnable(model) is model


def test_the_original_is_left_alone_and_names_stay() -> None:
    model = fp4_chain(np.float32, 0.01, FLOAT, [1, 4, 64])
    before = model.digest()
    ready = runnable(model)
    assert model.digest() == before
    assert [v.name for v in ready.graph.outputs] == ["y"]
    assert "xs" in {v.name for n in ready.graph for v in n.outputs}


def test_an_unknown_rank_is_an_error_that_says_so() -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape")
    chain = fp4_chain(np.float32, 0.01, FLOAT, [4, 64]).to_proto()
    chain.graph.node.insert(0, node)
    chain.graph.node[1].input[0] = "r"
    chain.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [None]))
    with pytest.raises(ModelError, match="rank of its input is not known"):
        runnable(Model.from_proto(chain))
