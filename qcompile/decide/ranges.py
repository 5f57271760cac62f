"""The clipping range of an activation by each method, and the search for the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Histogram, HistogramStat, MinMax, MinMaxStat, Probe, Rows, RowsStat, Told
from qcompile.calib.observe.change import Foldable
from qcompile.decide.placement import Point
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
_TOO_WIDE = 2**0.5  # half a bit


@dataclass(frozen=True)
class Chosen:
    """A range and the method that found it."""

    lo: F64
    hi: F64
    method: str


def automatic(spec: QuantSpec) -> Method:
    """The method of `annotate{range=auto}`."""
    return "minmax" if spec.qtype.bits > 8 or spec.qtype.family == "float" else "mse"


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a tensor's values: their extremes (by channel behind a fold) or how they spread, and a sample of rows."""

    spread: HistogramStat | MinMaxStat
    rows: RowsStat | None = None

    def extremes(self) -> Range:
        """The exact ends, of all channels."""
        return np.asarray(self.spread.lo.min()), np.asarray(self.spread.hi.max())

    def histogram(self) -> HistogramStat | None:
        """How the values spread; behind a fold that of the sampled rows, between exact ends.  None: only the ends are known."""
        if isinstance(self.spread, HistogramStat):
            return self.spread
        if self.rows is None:
            return None
        lo, hi = self.extremes()
        return replace(Histogram().observe(self.rows.rows), lo=lo, hi=hi)


@dataclass(frozen=True)
class Asked:
    """The statistics that set the range of one tensor: a folded input's followed the fold, anything else is observed."""

    spread: Probe[HistogramStat] | Probe[MinMaxStat]
    rows: Probe[RowsStat] | None = None

    @property
    def probes(self) -> list[Probe[Any]]:
        """All of them."""
        return [self.spread] if self.rows is None else [self.spread, self.rows]

    def seen(self, told: Told) -> Seen:
        """The answers."""
        return Seen(told[self.spread], None if self.rows is None else told[self.rows])


@dataclass
class Readers:
    """The weights [K, N] of all linear layers that read each tensor (they share its range), and the ranges found so far."""

    weights: dict[ir.Value, list[NDArray[np.float32]]] = field(default_factory=dict[ir.Value, list[NDArray[np.float32]]])
    found: dict[tuple[Asked, QuantSpec, str], Chosen] = field(default_factory=dict[tuple[Asked, QuantSpec, str], Chosen])

    @classmethod
    def of(cls, points: Iterable[Point]) -> Readers:
        """Of every tensor that is quantized."""
        readers = cls()
        for point in points:
            if (weight := _weight(point)) is not None:
                readers.weights.setdefault(point.measured, []).append(weight)
        return readers

    def probes(self, point: Point, method: str) -> list[Probe[Any]]:
        """What `choose` reads."""
        wider = _as_joined(point)
        return self._asks(point, method).probes + ([] if wider is None else self._asks(wider, method).probes)

    def _asks(self, point: Point, method: str) -> Asked:
        value = point.measured
        if point.carried or (input_folded(point.node) and point.slot >= 0):
            return Asked(*Foldable.of(value).probes)
        if method == "minmax":
            return Asked(MinMax().of(value))
        sampled = method in ("weighted", "search") and value in self.weights
        return Asked(Histogram().of(value), Rows(SEARCH_ROWS).of(value) if sampled else None)

    def choose(self, point: Point, method: str, told: Told) -> Chosen:
        """The range of a point's tensor, or the one that it shares."""
        own, wider = self._chosen(point, method, told), _as_joined(point)
        if wider is None:
            return own
        shared, name = self._chosen(wider, method, told), wider.measured.name
        times = _span(shared, point.spec) / max(_span(own, point.spec), 1e-30)
        if point.spec.qtype.family == "int" and times > _TOO_WIDE:
            return replace(own, method=f"{own.method}; that of {name} is {times:.1f} times as wide")
        return replace(shared, method=f"{shared.method} of {name}, so that one scale serves both")

    def _chosen(self, point: Point, method: str, told: Told) -> Chosen:
        asked = self._asks(point, method)
        key = (asked, point.spec, method)
        if key not in self.found:
            self.found[key] = choose(method, point.spec, asked.seen(told), self.weights.get(point.measured, ()), point.seen)
        return self.found[key]


def _as_joined(point: Point) -> Point | None:
    """The point over the range of the wider tensor."""
    return None if point.joined is None else replace(point, like=point.joined, joined=None, carried=False)


def _span(found: Chosen, spec: QuantSpec) -> float:
    """What one code is a share of."""
    lo, hi = min(0.0, float(np.min(found.lo))), max(0.0, float(np.max(found.hi)))
    return 2 * max(-lo, hi) if spec.symmetric else hi - lo


def choose(
    method: str, spec: QuantSpec, seen: Seen, readers: Sequence[NDArray[np.float32]], through: ranges.Function | None = None
) -> Chosen:
    """The range of one tensor.  `entropy` is defined for integers only: small floats take the least squared error.

    `through` is the function through which alone the tensor is seen; the least squared error is that of its values.
    """
    hist, rows = None if method == "minmax" else seen.histogram(), None if seen.rows is None else seen.rows.rows
    if hist is None:
        return Chosen(*seen.extremes(), "minmax")
    if method in ("weighted", "search"):
        return (_weighted if method == "weighted" else _searched)(hist, spec, rows, _joint_weight(rows, readers))
    method = "mse" if method == "entropy" and spec.qtype.family != "int" else method
    if method == "mse" and through is not None:
        return Chosen(*ranges.mse(hist, spec.qtype, spec.symmetric, through), "mse behind the activation")
    return Chosen(*_METHODS[method](hist, spec.qtype, spec.symmetric), method)


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


def _weight(point: Point) -> NDArray[np.float32] | None:
    """The constant matrix that multiplies this point's tensor, as [K, N]."""
    node = point.node
    if node.op_type not in ("MatMul", "Gemm") or point.slot != 0 or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    constant = const_array(node.inputs[1])
    if constant is None or constant.ndim != 2 or point.like is not None:
        return None
    weight = np.asarray(constant, np.float32)
    return weight.T if node.op_type == "Gemm" and int_attr(node, "transB", 0) else weight
