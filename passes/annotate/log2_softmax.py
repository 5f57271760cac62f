"""log2-softmax: companded codes for attention probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Moments, MomentsStat, Probe, Rows, RowsStat
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.decide.decisions import decide, decision, settled
from qcompile.decide.quantizer import Quantizer, value_at
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.ir.ops import is_op
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.companding import Error, codebook, companded_type, fit, product_error, value_error
from qcompile.quant.qtype import FLOAT8E4M3FN, QType, qtype
from qcompile.quant.spec import QuantSpec
from qcompile.structure.scores import Values, find_values

_SEARCHED = 128


@dataclass(frozen=True)
class Log2Softmax(Pass):
    """Give softmax outputs codes that are fine where probabilities crowd: P ~ a table of 2^b values, powers of 2 by default.

    before: MatMul(P, V) with P in uniform codes or float    after: the same graph; P is decided as a table of 2^b values
    log2, log-sqrt2: s 2^(-q / 1 or 2), one code for 0 (FQ-ViT, arXiv:2111.13824; RepQ-ViT, arXiv:2212.08254, eq. 11-12).
    adalog: s 2^(-q p / 37) (AdaLog, arXiv:2407.12951).  sulq: 2^(q D + m) - eta (I&S-ViT, arXiv:2311.10126).  tan: even
    steps of tan(a (P / s - 1/2)) (DopQ-ViT, reconstructed from the abstract).  twin: a fine and a coarse step, one bit
    chooses (PTQ4ViT, arXiv:2111.12293, by the definition, not by its code, which adds the split to every value).
    uniform: even steps, to compare with.  s, p, eta, a and the split: the least squared error of P V on calibration rows.
    Simulated: right numbers on `ort`, no integer kernel gains from it.  Elsewhere refused, P stays uniform; but with
    deploy=fp8 (an experiment) powers of two go through FP8 Q/DQ without loss on `trt` and `rtx` under the scheme fp8; the
    remark compares them with plain FP8.  In TensorRT-RTX both products stay FP8, but the fused attention kernel is lost.
    """

    name = "log2-softmax"
    kind = Kind.ANNOTATE
    needs = Stage.DECIDED
    kind_: Annotated[Literal["log2", "log-sqrt2", "sulq", "adalog", "tan", "twin", "uniform"], "how the levels are laid out"] = (
        "log2"
    )
    bits: Annotated[int, "code width; 0 means the scheme's activation width"] = 0
    paper: Annotated[bool, "the published levels (the log family has 2^b + 1) instead of 2^b with a code for the top"] = False
    deploy: Annotated[Literal["table", "fp8"], "simulate by a table, or feed an FP8 product with powers of two"] = "table"

    def __post_init__(self) -> None:
        if self.bits:
            self.check_range("bits", 2, 8)
        if self.deploy == "fp8" and (self.kind_ != "log2" or self.bits not in (0, 2, 3, 4)):
            raise UsageError("log2-softmax: deploy=fp8 holds powers of two in at most 4 bits; set kind=log2 bits=4")

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """A sample of probability rows, and the spread of V."""
        if self._refusal(ctx):
            return
        for _, values in _attentions(model.graph):
            yield _rows_probe(values)
            if values.slot == 1:
                yield _values_probe(values)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Decide every attention's probabilities."""
        found, reason = list(_attentions(model.graph)), self._refusal(ctx)
        done = [self._one(node, values, reason, ctx) for node, values in found]
        if not found:
            ctx.remarks.note("", "no softmax output is multiplied with values")
        return PassResult(any(done))

    def _refusal(self, ctx: PassContext) -> str | None:
        target, able = ctx.target.name, ctx.target.expresses(self._coded(ctx))
        if self.deploy == "fp8":
            fits = able and ctx.scheme.activation == FLOAT8E4M3FN and ctx.scheme.block_size is None
            return None if fits else f"deploy=fp8 needs the scheme fp8 on trt or rtx, this is {ctx.scheme.name} on {target}"
        return None if able else f"target {target} cannot express companded codes; probabilities stay uniform"

    def _one(self, node: ir.Node, values: Values[ir.Node], reason: str | None, ctx: PassContext) -> bool:
        matmul, slot = values.matmul, 1 - values.slot
        reason = reason or ctx.selection.excluded(matmul) or ctx.selection.excluded(node) or settled(matmul)
        if not reason and self.deploy == "fp8" and decision(matmul, slot) is None:
            reason = "the product of probabilities and values is left in float"
        if reason:
            ctx.remarks.missed(str(node.name), reason)
            return False
        stat = ctx.told[_rows_probe(values)]
        coded, error = self._coded(ctx), _error(values, ctx)
        rows = stat.rows[:_SEARCHED].astype(np.float64)
        params = fit(coded, rows, error)
        decide(matmul, slot, Quantizer(QuantSpec(coded), params))
        numbers = {"scale": float(params.scale), "sqnr_db": _sqnr(rows, codebook(coded, params).fake_quant(rows), error)}
        if self.deploy == "fp8":
            plain = fake_quant(rows, qparams_from_range(0.0, rows.max(), FLOAT8E4M3FN), FLOAT8E4M3FN)
            numbers["plain_fp8_sqnr_db"] = _sqnr(rows, plain, error)
        numbers |= {f"curve{i}": float(c) for i, c in enumerate(params.curve)}
        ctx.remarks.applied(str(node.name), f"probabilities in {coded.name}", **numbers)
        return True

    def _coded(self, ctx: PassContext) -> QType:
        scheme_bits = ctx.scheme.activation.bits if ctx.scheme.activation else 8
        if self.deploy == "fp8":
            table = companded_type("log2", self.bits or 4, self.paper)
            return qtype(f"{table.name}@{FLOAT8E4M3FN.name}")
        return companded_type(self.kind_, self.bits or scheme_bits, self.paper)


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, Values[ir.Node]]]:
    for node in graph:
        values = find_values(node) if is_op(node, "Softmax") else None
        if values is not None:
            yield node, values


def _rows_probe(values: Values[ir.Node]) -> Probe[RowsStat]:
    return Rows(FOLD_ROWS).of(value_at(values.matmul, 1 - values.slot))


def _values_probe(values: Values[ir.Node]) -> Probe[MomentsStat]:
    return Moments(-1).of(value_at(values.matmul, values.slot))


def _error(values: Values[ir.Node], ctx: PassContext) -> Error:
    """Of P V where V's moments are known, else of P."""
    stat = ctx.told.get(_values_probe(values))
    if stat is None or not stat.count:
        return value_error
    return product_error(float(stat.var.sum()), float(np.square(stat.mean).sum()))


def _sqnr(rows: NDArray[np.float64], coded: NDArray[np.float64], error: Error) -> float:
    return round(10 * float(np.log10((error(rows) + 1e-30) / (error(coded - rows) + 1e-30))), 2)
