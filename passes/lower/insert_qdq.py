"""insert-qdq: decisions become QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.decide.decisions import clear_decisions, value_at
from qcompile.ir.model import Model
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult
from qcompile.rewrite.qdq import Use, grouped, materialise


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Make every decision real: one Q/DQ pair a tensor, integer weights behind one DQ.

    before: MatMul(x, W) with decisions on both inputs
    after:  MatMul(DQ(Q(x, s, 0)), DQ(codes(W), s_w[axis], 0));  Q(x) = clip(round(x / s) + z) (ONNX QuantizeLinear)
    A width that the format cannot store (6 bit in int8) is simulated: Clip to the range before Q.
    NVFP4: W behind DQ(fp4, DQ(fp8 block scales, s_t)); x through trt::TRT_FP4DynamicQuantize and the same two DQ.
    MXFP8: trt::TRT_MXFP8DynamicQuantize and trt::TRT_MXFP8DequantizeLinear.
    """

    name = "insert-qdq"
    kind = Kind.LOWER
    requires = frozenset({Fact.DECIDED, Fact.FITTED})
    establishes = frozenset({Fact.QUANTIZED})

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Raises ModelError: uses of one tensor disagree on its quantizer, or a decision has no scale."""
        groups = grouped(model.graph, ctx)
        for (tensor, _), uses in groups.items():
            _one(model.graph, tensor, uses, ctx)
        clear_decisions(model.graph)
        return PassResult(bool(groups))


def _one(graph: ir.Graph, tensor: str, uses: list[Use], ctx: PassContext) -> None:
    node, slot, decision = uses[0]
    kind = "activation" if value_at(node, slot).const_value is None else "weight"
    params = materialise(graph, uses, ctx)
    form = decision.spec.block_format or decision.spec.qtype.name
    ctx.remarks.applied(str(node.name), f"{kind} {tensor} in {form}", scale=float(np.mean(params.scale)), uses=len(uses))
