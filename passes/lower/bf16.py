"""bf16: the float rest in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qcompile.calib.observe import Probe
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.quant.spec import Scheme
from qcompile.rewrite.half.convert import lower, wanted
from qcompile.rewrite.half.types import BFLOAT16


@dataclass(frozen=True)
class BrainHalf(Pass):
    """Turn float32 tensors, weights and scales into bfloat16: float32's range, 8 bits of precision.

    before: x: f32 -> MatMul -> y: f32
    after:  x: f32 -> Cast -> MatMul in bf16 -> Cast -> y: f32
    Nothing overflows, but the variance of a decomposed norm, sines of many periods and integers beyond 256 stay in float32,
    each with a remark.  ONNX Runtime has few bfloat16 kernels: comparisons run on an emulation that rounds every tensor.
    """

    name = "bf16"
    kind = Kind.LOWER

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The same widths, with a bfloat16 rest."""
        return replace(scheme, body="bfloat16")

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The extremes that the rules read."""
        return wanted(model, BFLOAT16)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Convert every node that is safe; cast where precisions meet."""
        return PassResult(lower(model, BFLOAT16, ctx.told, ctx.remarks))
