"""insert-qdq: decisions become QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir

from qcompile.decide.decisions import Use, clear_decisions
from qcompile.decide.storable import refuse_unstorable
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.blockformats import block_format
from qcompile.quant.qtype import UINT8
from qcompile.rewrite.qdq import grouped, materialise, unsigned_weights
from qcompile.rewrite.recurrent import dynamic, lstms, unfit


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Make every decision real: one Q/DQ pair a tensor, integer weights behind one DQ.

    before: MatMul(x, W) with decisions on both inputs
    after:  MatMul(DQ(Q(x, s, 0)), DQ(codes(W), s_w[axis], 0));  Q(x) = clip(round(x / s) + z) (ONNX QuantizeLinear)
    A tensor whose scale overflows or vanishes in the type of the float rest stays float, with the layer that reads it.
    A width that the format cannot store (6 bit in int8) is simulated: Clip to the range before Q.
    NVFP4: W behind DQ(fp4, DQ(fp8 block scales, s_t)); x through trt::TRT_FP4DynamicQuantize and the same two DQ.
    MXFP8: trt::TRT_MXFP8DynamicQuantize and trt::TRT_MXFP8DequantizeLinear.
    `weights=uint8` stores int8 codes 128 higher, with zero point 128: the same weights, for x86 CPUs without VNNI, where ONNX
    Runtime's sums of uint8 by int8 products saturate at 16 bits.  With VNNI it only costs speed.
    `lstm=dynamic` (target ort) writes LSTM layers as com.microsoft's DynamicQuantizeLSTM: weights in 8 bit, inputs and states
    quantized at run time; a quarter of the size, two to three times as fast as float, 35 to 37 dB on random weights.
    """

    name = "insert-qdq"
    kind = Kind.LOWER
    needs = Stage.FITTED
    reaches = Stage.LOWERED
    weights: Annotated[Literal["int8", "uint8"], "how codes of 8-bit weights are stored"] = "int8"
    lstm: Annotated[Literal["float", "dynamic"], "LSTM layers as they are, or quantized at run time"] = "float"

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Write the pairs.

        Raises:
            ModelError: uses of one tensor disagree on its quantizer, or a decision has no scale.
            UsageError: the target takes no uint8 weights, or has no quantized LSTM.
        """
        if self.weights == "uint8" and UINT8 not in ctx.target.weights:
            raise UsageError(f"target {ctx.target.name!r} has no kernels for uint8 weights; leave weights=uint8 out")
        if self.lstm == "dynamic" and not ctx.target.dynamic_lstm:
            raise UsageError(f"target {ctx.target.name!r} has no LSTM that is quantized at run time; leave lstm=dynamic out")
        refuse_unstorable(model.graph, ctx.target.body(ctx.scheme), ctx.remarks)
        groups = grouped(model.graph, ctx.target.one_quantizer)
        for uses in groups:
            _one(model.graph, uses, ctx)
        if self.weights == "uint8":
            unsigned_weights(model.graph)
        clear_decisions(model.graph)
        recurrent = [_lstm(model, n, ctx, self.weights == "uint8") for n in lstms(model.graph)] if self.lstm == "dynamic" else []
        return PassResult(bool(groups) or any(recurrent))


def _lstm(model: Model, lstm: ir.Node, ctx: PassContext, unsigned: bool) -> bool:
    """Whether the layer was written in 8 bit."""
    reason = ctx.selection.excluded(lstm) or unfit(lstm)
    if reason:
        ctx.remarks.missed(str(lstm.name), reason)
        return False
    dynamic(model.ir.opset_imports, model.graph, lstm, unsigned=unsigned)
    ctx.remarks.applied(str(lstm.name), "LSTM in 8 bit, quantized at run time")
    return True


def _one(graph: ir.Graph, uses: list[Use], ctx: PassContext) -> None:
    first, spec = uses[0], uses[0].quantizer.spec
    what = f"{'activation' if first.value.const_value is None else 'weight'} {first.value.name}"
    params = materialise(graph, uses, ctx.target.body(ctx.scheme))
    blocks = block_format(spec)
    form = spec.qtype.name if blocks is None else blocks.name
    ctx.remarks.applied(str(first.node.name), f"{what} in {form}", scale=float(np.mean(params.scale)), uses=len(uses))
