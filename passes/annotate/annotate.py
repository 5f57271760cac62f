"""annotate: decide what is quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe import HistogramStat, MinMaxStat, Probe
from qcompile.decide.completion import Completion, completion
from qcompile.decide.decisions import clear_decisions, decide, decision, decisions
from qcompile.decide.placement import Placement, Point
from qcompile.decide.quantizer import Quantizer
from qcompile.decide.ranges import Readers, automatic
from qcompile.decide.storable import refuse_unstorable
from qcompile.errors import DataError
from qcompile.ir.model import Model
from qcompile.ir.select import selected
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.affine import qparams_from_range
from qcompile.quant.blockformats import block_format
from qcompile.quant.spec import QParams, QuantSpec
from qcompile.structure.core import found_once
from qcompile.target.target import Choices

_HEADROOM = 2.0  # 16-bit codes have a bit to spare for what calibration did not see


@dataclass(frozen=True)
class Annotate(Pass):
    """Decide which tensors are quantized, in which type and over which range, for the target and scheme.

    before: MatMul(x, W)     after: the same graph; MatMul carries the decisions {x: int8 per tensor, W: int8 per column}
    Activation ranges: min-max, percentile (99.99), entropy (KL divergence, as TensorRT's calibrator) or the least squared
    error, all from one power-of-two histogram; weighted counts the squared errors of sampled rows by the energy of the
    weights that read each channel; search takes for each tensor the candidate with the least error of the linear layers
    that read it, on sampled rows (of the values themselves where a convolution reads them).
    """

    name = "annotate"
    kind = Kind.ANNOTATE
    reaches = Stage.DECIDED
    range_: Annotated[
        Literal["auto", "minmax", "percentile", "entropy", "mse", "weighted", "search"], "how activation ranges are chosen"
    ] = "auto"
    attention: Annotated[
        Literal["auto", "all", "none"], "quantize the two products of attention (auto: where the fused kernel survives it)"
    ] = "auto"
    probabilities: Annotated[
        Literal["auto", "fixed", "measured"],
        "range of the softmax output (TensorRT): [0, 1] or as measured; auto: fixed in fp8",
    ] = "auto"
    residual: Annotated[
        Literal["float", "shared"],
        "what the skip connections of convolutions read (TensorRT): float, or the DQ of the next convolution",
    ] = "float"

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """One statistic for each activation."""
        points = self._todo(model, self._place(model, ctx), ctx).open
        readers = Readers.of(points)
        return dict.fromkeys(p for s in points if not s.is_weight for p in self._probes(s, ctx, readers))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Write the decisions; earlier ones are replaced, but for imported ones.

        Raises:
            DataError: a tensor holds no value in any sample, and the target keeps nothing in float.
        """
        clear_decisions(model.graph, keep_imported=True)
        placement = self._place(model, ctx)
        todo = self._todo(model, placement, ctx)
        readers = Readers.of(todo.open)
        unfilled = self._unfilled(todo.open, ctx, readers)
        if unfilled and _all_in_codes(ctx):
            what = (
                f"no calibration sample puts a value into {next(iter(unfilled.values()))!r}, and {ctx.target.name} keeps nothing"
            )
            raise DataError(f"{what} in float; give samples that fill it, or compile for --target ort")
        for point, quantizer in todo.shared:
            _share(point, quantizer, ctx)
        for point in (p for p in todo.open if p.node not in unfilled):
            self._decide(point, ctx, readers)
        for node, tensor in unfilled.items():
            ctx.remarks.missed(str(node.name), f"kept in float: no calibration sample puts a value into {tensor}")
        for node, reason in placement.missed:
            if node not in todo.nodes:
                ctx.remarks.missed(node, reason)
        for node, reason in placement.notes:
            ctx.remarks.note(node, reason)
        refuse_unstorable(model.graph, ctx.target.body(ctx.scheme), ctx.remarks)
        _remark_idle(model, placement, ctx)
        return PassResult(bool(decisions(model.graph)))

    def _todo(self, model: Model, placement: Placement, ctx: PassContext) -> Completion:
        return completion(model.graph, placement.points, every=_all_in_codes(ctx), one=ctx.target.one_quantizer)

    def _place(self, model: Model, ctx: PassContext) -> Placement:
        choices = Choices(self.attention, self.probabilities, self.residual)
        return found_once(model.graph, self, lambda: ctx.target.place(model, ctx.scheme, ctx.selection, choices))

    def _method(self, point: Point, ctx: PassContext) -> str:
        if point.spec.qtype.bits > 8:
            return "minmax"
        return automatic(point.spec) if self.range_ == "auto" else self.range_

    def _probes(self, point: Point, ctx: PassContext, readers: Readers) -> list[Probe]:
        """Scales that are all found at run time need no statistics."""
        if _dynamic(point.spec) or point.bounds is not None or point.follows is not None:
            return []
        return readers.probes(point, self._method(point, ctx))

    def _unfilled(self, points: Sequence[Point], ctx: PassContext, readers: Readers) -> dict[ir.Node, str]:
        """Nodes with a tensor that held no value in any sample (an expert that got no token, an empty memory), and those that
        would share its quantizer."""
        found = dict[ir.Node, str]()
        for p in points:
            stats = [] if p.is_weight else [ctx.told[probe] for probe in self._probes(p, ctx, readers)]
            if any(isinstance(s, HistogramStat | MinMaxStat) and bool(np.any(s.lo > s.hi)) for s in stats):
                found.setdefault(p.node, str(p.measured.name))
        for p in points:
            if p.follows is not None and p.follows.node in found:
                found.setdefault(p.node, found[p.follows.node])
        return found

    def _decide(self, point: Point, ctx: PassContext, readers: Readers) -> None:
        name = str(point.value.name)
        if point.follows is not None:
            _follow(point, point.follows, ctx)
            return
        if point.is_weight:
            decide(point.node, point.slot, Quantizer(point.spec))
            ctx.remarks.applied(str(point.node.name), f"weight {name} in {point.spec.qtype.name}")
            return
        if (form := _dynamic(point.spec)) is not None:
            decide(point.node, point.slot, Quantizer(point.spec, QParams(np.ones(()), np.zeros((), np.int64))))
            ctx.remarks.applied(str(point.node.name), f"activation {name} in {form}, all scales found at run time")
            return
        lo, hi, method = self._range(point, ctx, readers)
        decide(point.node, point.slot, Quantizer(point.spec, _params(point.spec, lo, hi)))
        numbers = {"lo": float(np.min(lo)), "hi": float(np.max(hi)), "range": method}
        ctx.remarks.applied(str(point.node.name), f"activation {name} in {point.spec.qtype.name}", **numbers)

    def _range(self, point: Point, ctx: PassContext, readers: Readers) -> tuple[np.ndarray, np.ndarray, str]:
        """(lo, hi, how it was found)."""
        if point.bounds is not None:
            return np.asarray(point.bounds[0]), np.asarray(point.bounds[1]), "known"
        found = readers.choose(point, self._method(point, ctx), ctx.told)
        room = _HEADROOM if point.spec.qtype.bits > 8 else 1.0
        return found.lo * room, found.hi * room, found.method


def _share(point: Point, quantizer: Quantizer, ctx: PassContext) -> None:
    """The quantizer that the import gave to another reader of the tensor."""
    decide(point.node, point.slot, quantizer)
    ctx.remarks.applied(str(point.node.name), f"activation {point.value.name} shares the imported quantizer of another reader")


def _follow(point: Point, leader: Point, ctx: PassContext) -> None:
    """The same quantizer for another reader of the tensor."""
    led = decision(leader.node, leader.slot)
    assert led is not None
    decide(point.node, point.slot, led)
    ctx.remarks.applied(str(point.node.name), f"residual {point.value.name} shares the quantizer of {leader.node.name}")


def _all_in_codes(ctx: PassContext) -> bool:
    """Whether the target has no float operators inside."""
    return "insert-qdq" not in ctx.target.lowering(ctx.scheme)


def _remark_idle(model: Model, placement: Placement, ctx: PassContext) -> None:
    """Selectors that choose no node that could be quantized: misspelt, or folded away by an earlier pass."""
    names = {str(s.node.name) for s in placement.points} | {name for name, _ in placement.missed}
    for selector in dict.fromkeys(ctx.selection.selectors):
        if not any(n.name in names for n in selected(selector, model.graph)):
            ctx.remarks.missed("", f"selector {selector!r} chooses no node that could be quantized here")


def _dynamic(spec: QuantSpec) -> str | None:
    """The name of a block format whose activations have no scale before run time."""
    form = block_format(spec)
    return form.name if form is not None and form.activation is None else None


def _params(spec: QuantSpec, lo: np.ndarray, hi: np.ndarray) -> QParams:
    """The scale that covers [lo, hi]; of a block format, what is known of its scales before run time."""
    form = block_format(spec)
    if form is not None and form.activation is not None:
        return form.activation(lo, hi)
    return qparams_from_range(lo, hi, spec.qtype, spec.symmetric)
