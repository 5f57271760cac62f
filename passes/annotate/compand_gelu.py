"""compand-gelu: companded codes for what the second linear of an MLP reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from qcompile.calib.observe import Probe, Rows, RowsStat
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.decide.decisions import decide, decision, settled
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.companding import GELU_MINIMUM, Error, codebook, companded_type, fit
from qcompile.quant.qtype import QType
from qcompile.quant.spec import QuantSpec
from qcompile.structure import Mlp, find_mlps

_ELEMENTS = 32768
_FEWEST_ROWS = 16
_SLACK = 1e-3
_TYPES = {"adalog": ("adalog", GELU_MINIMUM), "twin": ("twin-gelu", 0.0)}


@dataclass(frozen=True)
class CompandGelu(Pass):
    """Give GELU outputs codes that are fine near zero, and a range of their own to the small negative values.

    before: GELU -> MatMul(h, W) with h in uniform codes    after: the same graph; h is decided as a table of 2^b values
    adalog: h ~ s 2^(-q p / 37) - d, d = 0.16997..., the depth of GELU (AdaLog, arXiv:2407.12951); `bias-reparam` moves d.
    twin: h ~ k D+ for k = 0 .. 2^(b-1) - 1, or k d / 2^(b-1) for k = -2^(b-1) .. -1 (PTQ4ViT, arXiv:2111.12293).
    s, p and D+: the least squared error, each channel weighted by the energy of its row of W.
    Simulated: right numbers on `ort`, refused elsewhere; `split-range` is the form of twin that TensorRT can run.
    """

    name = "compand-gelu"
    kind = Kind.ANNOTATE
    needs = Stage.DECIDED
    kind_: Annotated[Literal["adalog", "twin"], "how the levels are laid out"] = "adalog"
    bits: Annotated[int, "code width; 0 means the scheme's activation width"] = 0
    paper: Annotated[bool, "AdaLog's 2^b + 1 levels with rounded multipliers instead of 2^b exact ones"] = False

    def __post_init__(self) -> None:
        if self.bits:
            self.check_range("bits", 2, 8)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Rows of the hidden layers."""
        return [_probe(m) for m in find_mlps(model.graph).found if self._refusal(m, ctx) is None]

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Decide the input of every second linear."""
        matches = find_mlps(model.graph)
        for refused in matches.refused:
            ctx.remarks.missed(str(refused.node.name), refused.reason)
        done = [self._one(m, ctx) for m in matches.found]
        if not ctx.remarks.all:
            ctx.remarks.note("", "no linear layer reads a GELU")
        return PassResult(any(done))

    def _one(self, m: Mlp, ctx: PassContext) -> bool:
        reason = self._refusal(m, ctx)
        stat = None if reason else ctx.told[_probe(m)]
        if stat is not None and float(stat.rows.min()) < -GELU_MINIMUM - _SLACK:
            reason = f"its smallest value {float(stat.rows.min()):.3g} lies below the minimum of GELU"
        if reason or stat is None:
            ctx.remarks.missed(str(m.fc2.node.name), str(reason))
            return False
        _, shift = _TYPES[self.kind_]
        coded, error = self._coded(ctx), _error(m)
        rows = stat.rows[: max(_FEWEST_ROWS, _ELEMENTS // stat.rows.shape[1])].astype(np.float64)
        params = fit(coded, rows, error, shift)
        decide(m.fc2.node, m.fc2.input_slot, Quantizer(QuantSpec(coded), params))
        e = codebook(coded, params).fake_quant(rows) - rows
        sqnr = round(10 * float(np.log10((error(rows) + 1e-30) / (error(e) + 1e-30))), 2)
        ctx.remarks.applied(str(m.fc2.node.name), f"hidden layer in {coded.name}", scale=float(params.scale), sqnr_db=sqnr)
        return True

    def _coded(self, ctx: PassContext) -> QType:
        width = ctx.scheme.activation.bits if ctx.scheme.activation else 8
        return companded_type(_TYPES[self.kind_][0], self.bits or width, self.paper)

    def _refusal(self, m: Mlp, ctx: PassContext) -> str | None:
        if not ctx.target.expresses(self._coded(ctx)):
            return f"target {ctx.target.name} cannot express companded codes; split-range gives it two ranges"
        return _unfit(m, ctx)


def _unfit(m: Mlp, ctx: PassContext) -> str | None:
    if m.gate is not None or not m.activation.kind.endswith(("gelu-erf", "gelu-tanh", "quick-gelu")):
        return f"it reads {m.kind}, not a GELU"
    if m.fc2.channel_axis != -1:
        return "its channels are not the last axis"
    if reason := ctx.selection.excluded(m.fc2.node) or settled(m.fc2.node):
        return reason
    return None if decision(m.fc2.node, m.fc2.input_slot) is not None else "its input is left in float"


def _probe(m: Mlp) -> Probe[RowsStat]:
    return Rows(FOLD_ROWS).of(m.fc2.input)


def _error(m: Mlp) -> Error:
    """Squared error of the product for uncorrelated errors: the row W_j weighs channel j."""
    weight = const_array(m.fc2.weight)
    assert weight is not None
    energy = np.square(np.moveaxis(weight, m.fc2.in_axis, 0).reshape(m.fc2.in_channels, -1).astype(np.float64)).sum(1)
    return lambda e: float((np.square(e) @ energy).mean())
