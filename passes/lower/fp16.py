"""fp16: the float rest in half precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qcompile.calib.observe import Probe
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.rewrite.half.bias import free_large_biases
from qcompile.rewrite.half.convert import lower, wanted
from qcompile.rewrite.half.types import FLOAT16


@dataclass(frozen=True)
class Half(Pass):
    """Turn float32 tensors, weights and scales into float16; the graph's interface keeps its types.

    before: x: f32 -> MatMul -> y: f32
    after:  x: f32 -> Cast -> MatMul in f16 -> Cast -> y: f32
    What the type cannot hold stays in float32, in the smallest island and with the reason as a remark: tensors beyond 16376
    (a quarter of the largest number) on calibration data, reductions whose running sum may exceed 65504, the variance of a
    decomposed norm, epsilons below 2^-20 up to their division, divisors below 2^-14, sines of many periods, integers beyond
    2048, scales that vanish.  Attention masks are set to -16376, where the softmax is 0 all the same.
    """

    name = "fp16"
    kind = Kind.LOWER

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The extremes that the rules read."""
        return wanted(model, FLOAT16)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Convert every node that is safe; cast where precisions meet."""
        freed = free_large_biases(model.graph)
        if freed:
            ctx.remarks.note("", f"{freed} biases moved behind their layer: ONNX Runtime overflows them in float16")
        return PassResult(lower(model, FLOAT16, ctx.told, ctx.remarks))
