"""center: shifts that attention and norms absorb, so that symmetric codes waste no range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from qcompile.calib.observe import Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.equivalent.center.keys import Keys
from qcompile.passes.equivalent.center.outputs import Outputs
from qcompile.passes.equivalent.center.softmax import Probabilities
from qcompile.passes.equivalent.center.values import Values
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.structure import find_attentions, find_v_projections


@dataclass(frozen=True)
class Center(Pass):
    """Take the centre t = (max + min) / 2 of each channel out of a tensor where the shift costs nothing.

    before: K = x W_k + c_k            after: K - k0 by c_k - k0: q . k0 is constant along the softmax axis and drops out
    before: P V W_o + c_o              after: P (V - v0) W_o + (c_o + v0 W_o), since the rows of P sum to 1
    before: LayerNorm(g, b) -> W, c    after: LayerNorm(g, b - t) -> W, c + t W
    drop: k0 = c_k, the whole bias, which needs no range.
    balance: q_d / r_d and k_d r_d, r_d = sqrt(max|q_d| / max|k_d|) in each head channel, leaves q . k as it is.
    heads: the columns of W_v of head h / s_h and the rows of W_o that read them s_h, so that one scale fits all heads.
    gelu: a Sub behind GELU, undone in the bias of the next linear (one more pointwise operator); behind the Mul of `smooth`
    it finds no site, smooth{shift} does both in one.
    softmax: P V = (P - p0) V + p0 sum_keys V, p0 = max P / 2: a Sub, a ReduceSum, a Mul and an Add.  Its product is no longer
    in TensorRT's fused attention, and later passes find no V -> out-projection: run it last.
    Exact in float on every target, without a new node but for gelu and softmax.
    Zero points of asymmetric codes do the same for free, so this pays where zero points must be 0.
    Refused: K behind a rotary embedding or a norm, K or V that something else reads (a cache), scores that a Tanh, a Clip or
    a product changes before the softmax.
    """

    name = "center"
    kind = Kind.EQUIVALENT
    k: Annotated[bool, "centre the keys"] = True
    v: Annotated[bool, "centre the values"] = True
    norm: Annotated[bool, "centre the outputs of LayerNorms"] = True
    drop: Annotated[bool, "take the whole bias of the keys away instead of their centre"] = False
    balance: Annotated[bool, "give q and k equal ranges in each channel"] = False
    heads: Annotated[bool, "give the values of all heads one range"] = False
    gelu: Annotated[bool, "centre the hidden layer of MLPs by a Sub"] = False
    softmax: Annotated[bool, "centre the probabilities (leaves the fused attention kernel)"] = False

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Per-channel extremes of everything that may be shifted."""
        return dict.fromkeys(p for idea in self._ideas() for p in idea.probes(model))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Shift every site that is free; remark on the others."""
        if ctx.scheme.activation is None:
            ctx.remarks.missed("", "the scheme leaves activations in float, nothing to centre")
            return PassResult(False)
        changes = Changes()
        self._remark_refused(model, ctx)
        done = [idea.apply(model, ctx, changes) for idea in self._ideas()]
        return PassResult(any(done), changes)

    def _ideas(self) -> tuple[Outputs, Keys, Values, Probabilities]:
        """In the order in which they are done."""
        keys, values = Keys(self.k, self.drop, self.balance), Values(self.v, self.heads)
        return Outputs(self.norm, self.gelu), keys, values, Probabilities(self.softmax)

    def _remark_refused(self, model: Model, ctx: PassContext) -> None:
        """Attention and values that no rewrite can follow."""
        attentions = find_attentions(model.graph)
        for refusal in attentions.refused if self._wants_attention() else ():
            ctx.remarks.missed(str(refusal.node.name), f"attention not centred: {refusal.reason}")
        for refusal in find_v_projections(model.graph).refused if self.v or self.heads else ():
            if refusal not in attentions.refused:
                ctx.remarks.missed(str(refusal.node.name), f"values not centred: {refusal.reason}")

    def _wants_attention(self) -> bool:
        return self.k or self.drop or self.balance or self.v or self.heads or self.softmax
