"""dequantize: the float model inside a quantized one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir.edit import erase_dead
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.rewrite.imports import take_out_all


@dataclass(frozen=True)
class Dequantize(Pass):
    """Remove the Q/DQ nodes of a quantized model: weights become what their codes stand for, activations are not rounded.

    before: MatMul(DQ(Q(x, s)), DQ(codes, s_w))     after: MatMul(x, codes s_w)
    As the last pass that is named it ends the pipeline: the output is a float32 model.  With passes behind it the model is
    quantized anew, as --requantize does.
    """

    name = "dequantize"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL
    after = ("unify-qdq",)
    changes_function = True
    imports = True
    ends = True

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Take out what can be."""

        def missed(node: ir.Node, reason: str) -> None:
            ctx.remarks.missed(str(node.name), f"stays as it is: {reason}")

        done = take_out_all(model.graph, lambda node, slot, quantizer: None, missed)
        if not done:
            ctx.remarks.note("", "the model holds no Q/DQ nodes")
            return PassResult(False)
        ctx.remarks.applied("", f"{done} quantizers taken out")
        erase_dead(model)
        infer_shapes(model)
        return PassResult(True)
