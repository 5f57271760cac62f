"""import-qdq: the Q/DQ nodes of a quantized model become decisions."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.decide.decisions import decide
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.edit import erase_dead
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.passes.annotate.import_qdq.fit import fit
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.rewrite.imports import take_out_all


@dataclass(frozen=True)
class ImportQdq(Pass):
    """Read the Q/DQ nodes of a quantized model as decisions: scales, zero points and weight codes stay as they are.

    before: MatMul(DQ(Q(x, s)), DQ(codes, s_w))
    after:  MatMul(x, w) with the decisions {x: int8, s; w: int8, s_w, codes},  w = codes s_w
    annotate leaves them alone and decides what is still float.  What the target or the scheme cannot hold is decided anew,
    with a remark: a zero point where it must be 0 means a symmetric range that covers the old one; int8 and uint8 are
    exchanged without loss; a type that it lacks keeps its range.  Operators with scales of run time (DynamicQuantizeLinear,
    MatMulNBits) stay as they are.
    """

    name = "import-qdq"
    kind = Kind.ANNOTATE
    after = ("unify-qdq",)
    imports = True

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Take the Q/DQ nodes out and write the decisions."""

        def told(node: ir.Node, slot: int, quantizer: Quantizer) -> None:
            decide(node, slot, quantizer)
            kind = quantizer.spec.qtype.name
            what = "output" if slot < 0 else ("weight" if quantizer.codes is not None else "activation")
            ctx.remarks.applied(str(node.name), f"{what} in {kind}, as imported")

        def missed(node: ir.Node, reason: str) -> None:
            ctx.remarks.missed(str(node.name), f"stays as it is: {reason}")

        done = take_out_all(model.graph, told, missed)
        fit(model.graph, ctx)
        erase_dead(model)
        infer_shapes(model)
        return PassResult(bool(done))
