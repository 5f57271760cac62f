"""unify-qdq: one form for the Q/DQ nodes that tools write in many."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir.edit import erase_dead
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.passes.forms.unify_qdq.activations import clip_in_front, hoist_dequantize, merge_equal, spell_relu
from qcompile.passes.forms.unify_qdq.batch_norm import fold_norms
from qcompile.passes.forms.unify_qdq.weights import float_biases, quantize_constants, turn_codes
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage


@dataclass(frozen=True)
class UnifyQdq(Pass):
    """Bring the Q/DQ nodes of a quantized model into one form, without moving a code of a weight.

    before: float weight -> Q -> DQ -> Transpose;   Clip on codes;    DQ of int32 bias;   Q -> Reshape on codes -> DQ
    after:  codes -> DQ;                            Clip in front;    float bias;         Q -> DQ -> Reshape -> Q -> DQ
    before: Conv(x, DQ(codes, s)) -> BatchNormalization(gamma, beta, mu, v)
    after:  Conv(x, DQ(codes, s |f|), (c - mu) f + beta),  f = gamma / sqrt(v + eps), codes negated where f < 0
    Equal Q of a tensor become one, equal DQ of a Q too; a zero point at the lowest code stands for a Relu that another tool
    removed, which is written again.  Operators on codes (QLinearConv) were already spelled as Q/DQ by canonicalize.
    """

    name = "unify-qdq"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rewrite everything that has another form; see the class."""
        graph, done = model.graph, 0
        for step, what in _STEPS:
            if found := step(graph):
                done += len(found)
                for node in found:
                    ctx.remarks.applied(str(node), what)
        if not done:
            ctx.remarks.note("", "nothing to unify")
            return PassResult(False)
        erase_dead(model)
        infer_shapes(model)
        return PassResult(True)


_STEPS = (
    (quantize_constants, "the quantized weight is stored as codes"),
    (float_biases, "the bias in int32 codes became floats"),
    (turn_codes, "moved in front of the DequantizeLinear, onto the codes"),
    (fold_norms, "folded into the scale of the quantized weight and the bias"),
    (clip_in_front, "the limits of codes moved in front of the QuantizeLinear"),
    (hoist_dequantize, "numbers are moved instead of codes"),
    (merge_equal, "an equal quantizer does the same"),
    (spell_relu, "the Relu that its zero point stands for is written again"),
)
