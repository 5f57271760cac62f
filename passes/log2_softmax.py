"""log2-softmax: logarithmic codes for attention probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calib.observers import Probe, Rows, RowsStat
from qcompile.ir.decisions import Decision, decide
from qcompile.ir.match_scores import Values, find_values
from qcompile.ir.model import Model
from qcompile.ir.ops import is_op
from qcompile.pipeline.base import FOLD_ROWS, Fact, Kind, Pass, PassContext, PassResult
from qcompile.quant.companding import best_log_scale, log_type
from qcompile.quant.spec import QParams, QuantSpec


@dataclass(frozen=True)
class Log2Softmax(Pass):
    """Give softmax outputs logarithmic codes: P ~ s 2^(-q / 2) (log-sqrt2) or s 2^-q (log2).

    before: MatMul(P, V) with P in uniform codes or float    after: the same graph; P is decided as a table of 2^b values
    q = round(-2 log2(P / s)), codes past the last stand for 0 (RepQ-ViT, arXiv:2212.08254, eq. 11-12; FQ-ViT for log2).
    s is the quantile with the least squared error.  Simulated: right numbers on `ort`, no integer kernel gains from it.
    Refused on TensorRT, which has no logarithmic codes: P stays uniform there.
    """

    name = "log2-softmax"
    kind = Kind.ANNOTATE
    requires = frozenset({Fact.DECIDED})
    kind_: Annotated[Literal["log2", "log-sqrt2"], "the base of the logarithm"] = "log2"
    bits: Annotated[int, "code width; 0 means the scheme's activation width"] = 0
    paper: Annotated[bool, "the paper's 2^b + 1 values instead of 2^b"] = False

    def __post_init__(self) -> None:
        if self.bits:
            self.check_range("bits", 2, 8)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """A sample of probability rows."""
        return [_probe(values, node) for node, values in _attentions(model.graph)] if _expressible(ctx) else []

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Decide every attention's probabilities."""
        found = list(_attentions(model.graph))
        if not _expressible(ctx):
            for node, _ in found:
                ctx.missed(
                    str(node.name), f"target {ctx.target.name} cannot express logarithmic codes; probabilities stay uniform"
                )
            return PassResult(False)
        bits = self.bits or (ctx.scheme.activation.bits if ctx.scheme.activation else 8)
        for node, values in found:
            self._decide(node, values, bits, ctx)
        return PassResult(bool(found))

    def _decide(self, node: ir.Node, values: Values, bits: int, ctx: PassContext) -> None:
        stat = ctx.stats[_probe(values, node)]
        assert isinstance(stat, RowsStat)
        qtype = log_type(self.kind_, bits, self.paper)
        scale = best_log_scale(stat.rows, qtype)
        slot = 1 - values.slot
        name = str(values.matmul.inputs[slot].name)  # type: ignore[union-attr]
        params = QParams(np.asarray(scale), np.zeros((), np.int64))
        decide(values.matmul, slot, Decision(QuantSpec(qtype), f"{name}:{qtype.name}:{scale:.9g}", params))
        ctx.applied(str(node.name), f"probabilities in {qtype.name}", scale=scale)


def _expressible(ctx: PassContext) -> bool:
    return ctx.target.name == "ort"


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, Values]]:
    for node in graph:
        values = find_values(node) if is_op(node, "Softmax") else None
        if values is not None:
            yield node, values


def _probe(values: Values, node: ir.Node) -> Probe:
    source = values.matmul.inputs[1 - values.slot]
    assert source is not None
    return Probe(str(source.name), Rows(FOLD_ROWS))
