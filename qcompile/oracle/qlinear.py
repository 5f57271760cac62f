"""QLinearConv and QLinearMatMul (profile ort-fused) as ONNX Runtime's CPU kernels compute them.

The sums are exact int32; then one float32 multiplication, rounded half to even: the only place where the oracle leaves the
integers, with IEEE operations whose bits every machine agrees on.  The order (s_a * s_b) / s_y is ONNX Runtime's (MLAS); the ONNX
specification does not fix it, so that other runtimes may differ by one code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.oracle import checked
from qcompile.oracle.elementwise import Inputs, Kernel
from qcompile.oracle.graph import Op
from qcompile.oracle.linear import LINEAR

Array = NDArray[Any]
SUMS = {"QLinearConv": "ConvInteger", "QLinearMatMul": "MatMulInteger"}
SCALES = (1, 4, 6)
_OPERANDS = (0, 3, 2, 5)
BIAS = 8


def as_sum(op: Op) -> Op:
    """The int32 sums inside: ConvInteger or MatMulInteger of the same operands and zero points."""
    return replace(op, type=SUMS[op.type], inputs=tuple(op.inputs[slot] for slot in _OPERANDS))


def _qlinear(op: Op, inputs: Inputs) -> list[Array]:
    a_scale, b_scale, scale = (np.asarray(inputs[slot], np.float32) for slot in SCALES)
    inner = as_sum(op)
    (total,) = LINEAR[inner.type](inner, [inputs[slot] for slot in _OPERANDS])
    bias = inputs[BIAS] if len(inputs) > BIAS else None
    if bias is not None:
        total = checked.add(total, along_channels(bias, op, total.ndim))
    factor = np.divide(a_scale * b_scale, scale, dtype=np.float32)
    zero = inputs[7]
    assert zero is not None
    return [rescaled(total, along_channels(factor, op, total.ndim), zero)]


def along_channels(values: Array, op: Op, rank: int) -> Array:
    """One number for each output channel, in the shape that broadcasts to the output: axis 1, for products the last."""
    return values.reshape(1, -1, *(1,) * (rank - 2)) if op.type == "QLinearConv" and values.size > 1 else values


def rescaled(total: Array, factor: Array, zero: Array) -> Array:
    """clip(rint(float32(total) * factor) + zero) in the type of `zero`."""
    info, point = np.iinfo(zero.dtype), int(zero.reshape(-1)[0])
    real = np.multiply(total.astype(np.float32), factor, dtype=np.float32)
    held = np.clip(real, np.float32(info.min - point), np.float32(info.max - point))
    return (np.rint(held).astype(np.int64) + point).astype(zero.dtype)


QLINEAR: dict[str, Kernel] = dict.fromkeys(SUMS, _qlinear)
