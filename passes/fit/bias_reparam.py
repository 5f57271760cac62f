"""bias-reparam: the shift of AdaLog codes goes into the bias of the layer that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.decisions import Use, decide, decision, decisions
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.companding import kind_of
from qcompile.rewrite.linear import add_to_bias
from qcompile.structure import Linear, match_linear


@dataclass(frozen=True)
class BiasReparam(Pass):
    """Take the shift d of AdaLog codes off the bias instead of off every value (AdaLog, arXiv:2407.12951).

    before: MatMul(T[q] - d, Q(W)) + c    after: MatMul(T[q], Q(W)) + (c - d colsum(Q(W)))
    T holds powers of the base alone, as shift hardware has them; the layer's output stays what it was.
    The sum is that of the rounded weight: run it behind everything that fits weights.
    Simulated like the codes that it belongs to: right numbers on `ort`, no site elsewhere; exact in the layer's output.
    """

    name = "bias-reparam"
    kind = Kind.FIT
    needs = Stage.FITTED
    after = ("compand-gelu",)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Correct the bias of every layer that reads shifted codes."""
        done = [_one(model.graph, use, ctx) for use in _shifted(model.graph)]
        if not done:
            ctx.remarks.note("", "no layer reads AdaLog codes with a shift")
        return PassResult(any(done))


def _shifted(graph: ir.Graph) -> Iterator[Use]:
    for use in decisions(graph):
        coded, params = use.quantizer.spec.qtype, use.quantizer.qparams
        if coded.companded and kind_of(coded)[0] == "adalog" and params is not None and params.curve[2]:
            yield use


def _one(graph: ir.Graph, use: Use, ctx: PassContext) -> bool:
    node, slot, quantizer = use
    linear, params = match_linear(node), quantizer.qparams
    if not isinstance(linear, Linear) or linear.input_slot != slot or params is None:
        ctx.remarks.missed(str(node.name), "it has no constant weight whose columns could be summed")
        return False
    q, shift, offset = params.curve
    extra = -offset * _column_sums(linear)
    add_to_bias(graph, linear, extra)
    decide(node, slot, quantizer.with_qparams(replace(params, curve=(q, shift, 0.0))))
    ctx.remarks.applied(str(node.name), "the shift of its codes moved into its bias", largest=float(np.abs(extra).max()))
    return True


def _column_sums(linear: Linear) -> NDArray[np.float64]:
    """sum_in of the weight as it will be rounded, [out]."""
    weight = const_array(linear.weight)
    assert weight is not None
    d = decision(linear.node, linear.weight_slot)
    if d is not None and d.qparams is not None:
        weight = d.rounded(weight.astype(np.float32))
    return np.moveaxis(weight.astype(np.float64), linear.out_axis, 0).reshape(linear.out_channels, -1).sum(1)
