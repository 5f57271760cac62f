"""The clipping range of an activation by each method, and the search for the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import Histogram, HistogramStat, MinMax, MinMaxStat, Probe, Rows, RowsStat, Stat
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.decide.placement import Site
from qcompile.ir.notes import input_folded
from qcompile.ir.ops import const_array, int_attr
from qcompile.quant import ranges
from qcompile.quant.entropy import entropy
from qcompile.quant.qtype import QType
from qcompile.quant.spec import QuantSpec

F64 = NDArray[np.float64]
Method = Literal["minmax", "percentile", "entropy", "mse", "weighted", "search"]
Range = tuple[F64, F64]

PERCENTILES = (99.9, 99.99, 99.999)
SEARCH_ROWS = 128
_PERCENTILE = 99.99


@dataclass(frozen=True)
class Chosen:
    """A range and the method that found it."""

    lo: F64
    hi: F64
    method: str


def automatic(spec: QuantSpec) -> Method:
    """The method of `annotate{range=auto}`."""
    return "minmax" if spec.qtype.bits > 8 or spec.qtype.family == "float" else "mse"


def range_probes(site: Site, method: str, readers: Sequence[NDArray[np.float32]]) -> list[Probe]:
    """What `choose` reads: a folded input's statistics followed the fold; anything else is observed."""
    if site.carried or (input_folded(site.node) and site.slot >= 0):
        return [Probe(site.measured, MinMax(-1)), Probe(site.measured, Rows(FOLD_ROWS))]
    if method == "minmax":
        return [Probe(site.measured, MinMax())]
    rows = [Probe(site.measured, Rows(SEARCH_ROWS))] if method in ("weighted", "search") and readers else []
    return [Probe(site.measured, Histogram()), *rows]


@dataclass
class Readers:
    """The weights [K, N] of all linear layers that read each tensor (they share its range), and the ranges found so far."""

    weights: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict[str, list[NDArray[np.float32]]])
    found: dict[tuple[str, QuantSpec, str, int], Chosen] = field(default_factory=dict[tuple[str, QuantSpec, str, int], Chosen])

    @classmethod
    def of(cls, sites: Iterable[Site]) -> Readers:
        """Of every tensor that is quantized."""
        readers = cls()
        for site in sites:
            if (weight := _weight(site)) is not None:
                readers.weights.setdefault(site.measured, []).append(weight)
        return readers

    def probes(self, site: Site, method: str) -> list[Probe]:
        """What `choose` reads."""
        return range_probes(site, method, self.weights.get(site.measured, ()))

    def choose(self, site: Site, method: str, stats: Sequence[Stat]) -> Chosen:
        """The range of a site's tensor."""
        key = (site.measured, site.spec, method, id(stats[0]))
        if key not in self.found:
            self.found[key] = choose(method, site.spec, stats, self.weights.get(site.measured, ()))
        return self.found[key]


def choose(method: str, spec: QuantSpec, stats: Sequence[Stat], readers: Sequence[NDArray[np.float32]]) -> Chosen:
    """The range of one tensor.  `entropy` is defined for integers only: small floats take the least squared error."""
    if method == "minmax":
        return Chosen(*_extremes(stats), method)
    stat = _joined(stats)
    assert isinstance(stat, HistogramStat)
    if method in ("weighted", "search"):
        rows = next((s.rows for s in stats if isinstance(s, RowsStat)), None)
        return (_weighted if method == "weighted" else _searched)(stat, spec, rows, _joint_weight(rows, readers))
    method = "mse" if method == "entropy" and spec.qtype.family != "int" else method
    return Chosen(*_METHODS[method](stat, spec.qtype, spec.symmetric), method)


def _joint_weight(rows: NDArray[np.float32] | None, readers: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """All the readers' columns side by side [K, N]; None where none fits the rows."""
    fitting = [w for w in readers if rows is not None and rows.ndim == 2 and w.shape[0] == rows.shape[1]]
    return np.concatenate(fitting, axis=1) if fitting and rows is not None and len(rows) > 1 else None


def _weighted(
    hist: HistogramStat, spec: QuantSpec, rows: NDArray[np.float32] | None, weight: NDArray[np.float32] | None
) -> Chosen:
    """The least squared error of sampled rows, channel k counted by |W_k|^2; unweighted where no linear layer reads them."""
    if rows is None or weight is None:
        return Chosen(*ranges.mse(hist, spec.qtype, spec.symmetric), "mse")
    return Chosen(*_weighted_range(hist, spec, rows, weight), "weighted mse")


def _weighted_range(hist: HistogramStat, spec: QuantSpec, rows: NDArray[np.float32], weight: NDArray[np.float32]) -> Range:
    fit = _with_extremes(ranges.weighted_values(rows, np.square(weight).sum(1)), hist)
    return ranges.mse(fit, spec.qtype, spec.symmetric)


def _searched(
    hist: HistogramStat, spec: QuantSpec, rows: NDArray[np.float32] | None, weight: NDArray[np.float32] | None
) -> Chosen:
    """The candidate with the least error of the layers' outputs on sampled rows, or of the values on the histogram."""
    q, symmetric = spec.qtype, spec.symmetric
    names = [m for m in _METHODS if m != "entropy" or q.family == "int"]
    found = [Chosen(*_METHODS[m](hist, q, symmetric), m) for m in names]
    found += [Chosen(*ranges.percentile(hist, p, symmetric), f"percentile {p}") for p in PERCENTILES if p != _PERCENTILE]
    if rows is None or weight is None:
        return min(found, key=lambda c: ranges.histogram_error(hist, c.lo, c.hi, q, symmetric))
    # Fitted on half of the rows, judged on the other half.
    found.append(Chosen(*_weighted_range(hist, spec, rows[::2], weight), "weighted mse"))
    return min(found, key=lambda c: ranges.output_error(rows[1::2], weight, c.lo, c.hi, q, symmetric))


def _with_extremes(sampled: ranges.Weighted, hist: HistogramStat) -> ranges.Weighted:
    """Candidates reach up to the exact extremes."""
    return replace(sampled, lo=hist.lo, hi=hist.hi)


def _percentile(hist: HistogramStat, qtype: QType, symmetric: bool) -> Range:
    return ranges.percentile(hist, _PERCENTILE, symmetric)


def _minmax(hist: HistogramStat, qtype: QType, symmetric: bool) -> Range:
    return ranges.minmax(hist)


_METHODS: dict[str, Callable[[HistogramStat, QType, bool], Range]] = {
    "mse": ranges.mse,
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": entropy,
}


def _weight(site: Site) -> NDArray[np.float32] | None:
    """The constant matrix that multiplies this site's tensor, as [K, N]."""
    node = site.node
    if node.op_type not in ("MatMul", "Gemm") or site.slot != 0 or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    constant = const_array(node.inputs[1])
    if constant is None or constant.ndim != 2 or site.like is not None:
        return None
    weight = np.asarray(constant, np.float32)
    return weight.T if node.op_type == "Gemm" and int_attr(node, "transB", 0) else weight


def _extremes(stats: Sequence[Stat]) -> Range:
    """The exact ends: of all channels, where a fold left them by channel."""
    first = stats[0]
    if isinstance(first, MinMaxStat) and len(stats) > 1:
        return np.asarray(first.lo.min()), np.asarray(first.hi.max())
    return ranges.minmax(first)  # type: ignore[arg-type]


def _joined(stats: Sequence[Stat]) -> Stat:
    """One statistic: exact extremes over a histogram of the sampled rows, where a fold left these two."""
    first = stats[0]
    if not isinstance(first, MinMaxStat) or len(stats) == 1:
        return first
    rows = stats[1]
    assert isinstance(rows, RowsStat)
    return replace(Histogram().observe(rows.rows), lo=np.asarray(first.lo.min()), hi=np.asarray(first.hi.max()))
