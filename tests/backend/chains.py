"""Six quantized layers in a row, of which one (or none) is broken in a chosen way."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from tests.target.graphs import Builder, Form

LAYERS = 6
HALF = TensorProto.FLOAT16


def chain(broken: dict[int, str], op: str = "MatMul") -> onnx.ModelProto:
    """x -> (Q -> DQ -> op(., DQ w) -> Relu) * 6; `broken`: layer -> "zero point", "mixed" or "computed scale".

    The compute nodes are n_fc0 .. n_fc5, their quantizers n_x_q, n_act0_q ..
    """
    b, x = Builder(), "x"
    dims = [64, 64] if op == "MatMul" else [16, 16, 3, 3]
    for i in range(LAYERS):
        kind = broken.get(i, "")
        form = Form(zero_point=3 if kind == "zero point" else 0, computed_scale=kind == "computed scale")
        q = b.quantize(x, form, "int8")
        y = b.node(op, [q, _weight(b, i, dims, kind)], f"fc{i}", **({} if op == "MatMul" else {"pads": [1, 1, 1, 1]}))
        x = b.node("Relu", [y], f"act{i}")
    shape = [4, 64] if op == "MatMul" else [1, 16, 8, 8]
    return b.model([("x", HALF, shape)], [(x, HALF)], 21)


def _weight(b: Builder, i: int, dims: list[int], kind: str) -> str:
    rng = np.random.default_rng(i)
    fp8 = kind == "mixed"
    values = rng.normal(size=dims) if fp8 else rng.integers(-100, 100, size=dims)
    codes = b.tensor(f"w{i}_codes", TensorProto.FLOAT8E4M3FN if fp8 else TensorProto.INT8, dims, values)
    axis = 1 if len(dims) == 2 else 0
    return b.node("DequantizeLinear", [codes, b.tensor(f"w{i}_s", HALF, [dims[axis]], 0.004)], f"w{i}_dq", axis=axis)
