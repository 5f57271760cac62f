"""annotate: decide what is quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from qcompile.calib.observers import Histogram, HistogramStat, MinMax, MinMaxStat, Probe, Rows, RowsStat, Stat
from qcompile.ir.decisions import Decision, clear_decisions, decide
from qcompile.ir.model import Model
from qcompile.passes import _placement_ort, _placement_trt
from qcompile.passes._placement import Placement, Site
from qcompile.pipeline.base import FOLD_ROWS, Fact, Kind, Pass, PassContext, PassResult, input_folded, quantized_forms
from qcompile.quant import ranges
from qcompile.quant.affine import qparams_from_range
from qcompile.quant.spec import QParams, Scheme
from qcompile.target.target import Target

_TENSORRT = ("trt", "rtx")


@dataclass(frozen=True)
class Annotate(Pass):
    """Decide which tensors are quantized, in which type and over which range, for the target and scheme.

    before: MatMul(x, W)     after: the same graph; MatMul carries the decisions {x: int8 per tensor, W: int8 per column}
    Activation ranges: min-max, percentile (99.99) or the least squared error over a power-of-two histogram.
    """

    name = "annotate"
    kind = Kind.ANNOTATE
    requires = frozenset({Fact.CANONICAL, Fact.PADS_FOLDED, Fact.BN_FOLDED})
    establishes = frozenset({Fact.DECIDED})
    range_: Annotated[Literal["auto", "minmax", "percentile", "mse"], "how activation ranges are chosen"] = "auto"
    attention: Annotated[Literal["all", "none"], "quantize the two products of attention, or leave them in float"] = "all"

    def required(self, target: Target, scheme: Scheme) -> frozenset[Fact]:
        """The forms that quantization needs."""
        return self.requires | quantized_forms(target, scheme)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """One statistic for each activation."""
        return dict.fromkeys(p for s in self._place(model, ctx).sites if not s.is_weight for p in self._probes(s, ctx))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Write the decisions; earlier ones are replaced."""
        clear_decisions(model.graph)
        placement = self._place(model, ctx)
        for site in placement.sites:
            self._decide(site, ctx)
        for node, reason in placement.missed:
            ctx.missed(node, reason)
        return PassResult(bool(placement.sites))

    def _place(self, model: Model, ctx: PassContext) -> Placement:
        if ctx.scheme.weight is None:
            return Placement()
        if ctx.target.name in _TENSORRT or ctx.scheme.simulated or ctx.scheme.activation is None:
            return _placement_trt.place(model, ctx, self.attention)
        return _placement_ort.place(model, ctx)

    def _method(self, site: Site, ctx: PassContext) -> str:
        if self.range_ != "auto":
            return self.range_
        return "minmax" if site.spec.qtype.family == "float" else "mse"

    def _probes(self, site: Site, ctx: PassContext) -> list[Probe]:
        """A folded input's statistics followed the fold; anything else is observed."""
        if site.carried or (input_folded(site.node) and site.slot >= 0):
            return [Probe(site.measured, MinMax(-1)), Probe(site.measured, Rows(FOLD_ROWS))]
        return [Probe(site.measured, MinMax() if self._method(site, ctx) == "minmax" else Histogram())]

    def _decide(self, site: Site, ctx: PassContext) -> None:
        name = str(site.value.name)
        if site.is_weight:
            axis = str(site.spec.granularity)
            decide(site.node, site.slot, Decision(site.spec, f"{name}:{axis}"))
            ctx.applied(str(site.node.name), f"weight {name} in {site.spec.qtype.name}")
            return
        lo, hi = self._range(site, ctx)
        params = qparams_from_range(lo, hi, site.spec.qtype, site.spec.symmetric)
        decide(site.node, site.slot, Decision(site.spec, _quantizer(name, params), params))
        ctx.applied(
            str(site.node.name), f"activation {name} in {site.spec.qtype.name}", lo=float(np.min(lo)), hi=float(np.max(hi))
        )

    def _range(self, site: Site, ctx: PassContext) -> tuple[np.ndarray, np.ndarray]:
        stat = _joined([ctx.stats[p] for p in self._probes(site, ctx)])
        match self._method(site, ctx):
            case "percentile":
                assert isinstance(stat, HistogramStat)
                return ranges.percentile(stat, 99.99, site.spec.symmetric)
            case "mse":
                assert isinstance(stat, HistogramStat)
                return ranges.mse(stat, site.spec.qtype, site.spec.symmetric)
            case _:
                return ranges.minmax(stat)  # type: ignore[arg-type]


def _joined(stats: list[Stat]) -> Stat:
    """One statistic: exact extremes over a histogram of the sampled rows, where a fold left these two."""
    if len(stats) == 1:
        return stats[0]
    extremes, rows = stats
    assert isinstance(extremes, MinMaxStat) and isinstance(rows, RowsStat)
    return replace(Histogram().observe(rows.rows), lo=np.asarray(extremes.lo.min()), hi=np.asarray(extremes.hi.max()))


def _quantizer(name: str, params: QParams) -> str:
    """Equal uses of one tensor share this id."""
    return f"{name}:{float(params.scale):.9g}:{int(params.zero_point)}"
