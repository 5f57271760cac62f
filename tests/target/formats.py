"""Tiny graphs that a `Form` cannot say: block-scaled formats, and Q/DQ between several operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.target.graphs import Builder, Form

HALF, FLOAT, FP8, FP4, E8M0 = (
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT4E2M1,
    TensorProto.FLOAT8E8M0,
)


def _with_trt(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import.append(helper.make_opsetid("trt", 1))
    return model


def nvfp4(k: int = 64, axis: int = 0, block: int = 16, opset: int = 23, dynamic: bool = True) -> onnx.ModelProto:
    """y[4, 32] = NVFP4(x)[4, k] @ NVFP4(w)[k, 32]: fp8 block scales, one float32 scale on top of them."""
    b = Builder()
    x = b.node("Cast", ["x"], "x32", to=FLOAT)
    x = b.node("Cast", [_dynamic_fp4(b, x, block)], "x16", to=HALF) if dynamic else "x"
    w = b.node("Cast", [_static_fp4(b, [k, 32], axis, block)], "w16", to=HALF)
    b.node("MatMul", [x, w], "y")
    return _with_trt(b.model([("x", HALF, [4, k])], [("y", HALF)], opset))


def _dynamic_fp4(b: Builder, x: str, block: int) -> str:
    scale = b.tensor("x_s2", FLOAT, [], 0.01)
    b.nodes.append(
        helper.make_node(
            "TRT_FP4DynamicQuantize",
            [x, scale],
            ["x_f4", "x_s8"],
            name="n_x_q",
            domain="trt",
            axis=-1,
            block_size=block,
            scale_type=FP8,
        )
    )
    return b.node(
        "DequantizeLinear", ["x_f4", b.node("DequantizeLinear", ["x_s8", scale], "x_s")], "x_dq", axis=-1, block_size=block
    )


def _static_fp4(b: Builder, dims: Sequence[int], axis: int, block: int) -> str:
    blocks = list(dims)
    blocks[axis] //= block
    scale = b.node("DequantizeLinear", [b.tensor("w_s8", FP8, blocks, 0.5), b.tensor("w_s2", FLOAT, [], 0.01)], "w_s")
    codes = b.tensor("w_codes", FP4, dims, np.random.default_rng(0).choice([0, 0.5, 1, -2, 6], size=tuple(dims)))
    return b.node("DequantizeLinear", [codes, scale], "w_dq", axis=axis, block_size=block)


def mxfp8(k: int = 64, opset: int = 23) -> onnx.ModelProto:
    """y[4, 32] = MXFP8(x)[4, k] @ MXFP8(w)[k, 32]: blocks of 32 with power-of-two scales."""
    b = Builder()
    b.nodes.append(
        helper.make_node(
            "TRT_MXFP8DynamicQuantize",
            ["x"],
            ["x_f8", "x_s"],
            name="n_x_q",
            domain="trt",
            axis=-1,
            block_size=32,
            output_dtype=FP8,
        )
    )
    blocked = {"domain": "trt", "block_size": 32, "output_dtype": HALF}
    x = b.node("TRT_MXFP8DequantizeLinear", ["x_f8", "x_s"], "x_dq", axis=-1, **blocked)
    codes = b.tensor("w_codes", FP8, [k, 32], np.random.default_rng(0).normal(size=(k, 32)))
    scales = b.tensor("w_s", TensorProto.UINT8, [k // 32, 32], 120)
    w = b.node("TRT_MXFP8DequantizeLinear", [codes, scales], "w_dq", axis=0, **blocked)
    b.node("MatMul", [x, w], "y")
    return _with_trt(b.model([("x", HALF, [4, k])], [("y", HALF)], opset))


def concatenated(scales: tuple[float, float] = (0.05, 0.05), outer: bool = True) -> onnx.ModelProto:
    """Two quantized inputs are concatenated, and a convolution reads the result (through a Q/DQ of its own if `outer`)."""
    b, form = Builder(), Form()
    parts = [b.quantize(name, form, "int8", scale=s) for name, s in zip(("x", "z"), scales, strict=True)]
    joined = b.node("Concat", parts, "joined", axis=1)
    joined = b.quantize(joined, form, "int8") if outer else joined
    b.node("Conv", [joined, conv_weight(b, "w", [32, 32, 3, 3])], "y")
    dims = [1, 16, 8, 8]
    return b.model([("x", HALF, dims), ("z", HALF, dims)], [("y", HALF)], 21)


def conv_weight(b: Builder, name: str, dims: Sequence[int]) -> str:
    """A per-channel int8 convolution weight behind its DequantizeLinear."""
    codes = b.tensor(f"{name}_codes", TensorProto.INT8, dims, np.random.default_rng(0).integers(-9, 9, size=tuple(dims)))
    return b.node("DequantizeLinear", [codes, b.tensor(f"{name}_s", HALF, [dims[0]], 0.01)], f"{name}_dq", axis=0)


def two_quantizers(scales: tuple[float, float] = (0.05, 0.05)) -> onnx.ModelProto:
    """x feeds two convolutions, each through a QuantizeLinear of its own; their sum is the output."""
    b, form = Builder(), Form()
    outs: list[str] = []
    for i, scale in enumerate(scales):
        s, z = b.tensor(f"s{i}", HALF, [], scale), b.tensor(f"z{i}", TensorProto.INT8, [], 0)
        dq = b.node("DequantizeLinear", [b.node("QuantizeLinear", ["x", s, z], f"q{i}"), s, z], f"dq{i}")
        outs.append(b.node("Conv", [dq, conv_weight(b, f"w{i}", [32, 32, 3, 3])], f"y{i}"))
    b.node("Add", outs, "y")
    return b.model([("x", form.body, [1, 32, 8, 8])], [("y", form.body)], 21)


def loose_codes(op: str = "Transpose") -> onnx.ModelProto:
    """int8 codes are moved as integers (Transpose, Reshape ...) before their DequantizeLinear."""
    b, form = Builder(), Form(op="MatMul")
    x = b.quantize("x", form, "int8")
    codes = b.tensor("w_codes", TensorProto.INT8, [32, 64], np.random.default_rng(0).integers(-9, 9, size=(32, 64)))
    moved = b.node("Transpose", [codes], "w_t", perm=[1, 0]) if op == "Transpose" else b.node("Identity", [codes], "w_t")
    w = b.node("DequantizeLinear", [moved, b.tensor("w_s", HALF, [32], 0.01)], "w_dq", axis=1)
    b.node("MatMul", [x, w], "y")
    return b.model([("x", HALF, [4, 64])], [("y", HALF)], 21)


def residual(skip: str) -> onnx.ModelProto:
    """conv -> relu -> conv, plus the input: as it is ("float"), as the first conv's DQ ("shared"), or through Q/DQ ("own")."""
    b, form = Builder(), Form()
    x = b.quantize("x", form, "int8")
    inner = b.node("Relu", [b.node("Conv", [x, conv_weight(b, "w0", [32, 32, 3, 3])], "c0", pads=[1] * 4)], "r0")
    out = b.node("Conv", [b.quantize(inner, form, "int8"), conv_weight(b, "w1", [32, 32, 3, 3])], "c1", pads=[1] * 4)
    if skip == "own":
        s = b.tensor("o_s", HALF, [], 0.07)
        out = b.node("DequantizeLinear", [b.node("QuantizeLinear", [out, s, "x_z"], "o_q"), s, "x_z"], "o_dq")
    b.node("Add", [out, "x" if skip == "float" else x], "y")
    return b.model([("x", HALF, [1, 32, 8, 8])], [("y", HALF)], 21)


def pooled(op: str) -> onnx.ModelProto:
    """Q/DQ -> pooling -> Q/DQ -> Conv."""
    b, form = Builder(), Form()
    out = b.node(op, [b.quantize("x", form, "int8")], "m", kernel_shape=[2, 2], strides=[2, 2])
    b.node("Conv", [b.quantize(out, form, "int8"), conv_weight(b, "w", [32, 32, 3, 3])], "y")
    return b.model([("x", HALF, [1, 32, 8, 8])], [("y", HALF)], 21)


def between(op: str) -> onnx.ModelProto:
    """Q/DQ -> op -> Q/DQ -> MatMul: does a Q/DQ pair around `op` harm the GEMM?"""
    b, form = Builder(), Form()
    x = b.quantize("x", form, "int8")
    attributes: dict[str, object] = {"perm": [1, 0]} if op == "Transpose" else {"axis": -1} if op == "Softmax" else {}
    moved = b.node(op, [x], "m", **attributes)
    ready = moved if op == "Transpose" else b.quantize(moved, form, "int8", scale=1 / 127)
    codes = b.tensor("w_codes", TensorProto.INT8, [64, 32], np.random.default_rng(0).integers(-9, 9, size=(64, 32)))
    w = b.node("DequantizeLinear", [codes, b.tensor("w_s", HALF, [32], 0.01)], "w_dq", axis=1)
    b.node("MatMul", [ready, w], "y")
    return b.model([("x", HALF, [64, 64])], [("y", HALF)], 21)
