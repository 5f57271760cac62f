"""bf16: the float rest in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.passes.lower.half.convert import HalfLowering
from qcompile.passes.lower.half.types import BFLOAT16


@dataclass(frozen=True)
class BrainHalf(HalfLowering):
    """Turn float32 tensors, weights and scales into bfloat16: float32's range, 8 bits of precision.

    before: x: f32 -> MatMul -> y: f32
    after:  x: f32 -> Cast -> MatMul in bf16 -> Cast -> y: f32
    Nothing overflows, but the variance of a decomposed norm, sines of many periods and integers beyond 256 stay in float32,
    each with a remark.  ONNX Runtime has few bfloat16 kernels: comparisons run on an emulation that rounds every tensor.
    """

    name = "bf16"
    format = BFLOAT16
