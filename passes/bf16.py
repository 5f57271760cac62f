"""bf16: the float rest in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qcompile.calib.observers import Probe
from qcompile.ir.model import Model
from qcompile.passes._half import BFLOAT16
from qcompile.passes._half_lower import lower, wanted
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult
from qcompile.quant.spec import Scheme
from qcompile.target.target import Target


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
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.HALF})

    def required(self, target: Target, scheme: Scheme) -> frozenset[Fact]:
        """Quantizers come first: their scales are computed in float32, and stored in the type of the rest."""
        return self.requires | ({Fact.NORMS_FUSED} if scheme.weight is None else {Fact.QUANTIZED})

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The extremes of what is sensitive to precision: angles and integers."""
        return wanted(model, BFLOAT16)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Convert every node that is safe; cast where precisions meet."""
        return lower(model, ctx, BFLOAT16)
