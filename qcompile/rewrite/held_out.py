"""Whether a fold pays: the layers' output error on rows that the fold and the range were not fitted to.

r_j and the range are extremes of calibration rows, so the rows that set them are never clipped and every fold looks better on
them than it is: with few rows (a time embedding has one a sample) the error on new rows rises while that on the fitted ones
falls.  Each half of the samples is therefore judged with the fold and the range of the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import MinMaxStat, RowsStat
from qcompile.decide.ranges import Seen, automatic, choose
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.qtype import QType
from qcompile.quant.ranges import weight_mse_scale
from qcompile.quant.spec import PerAxis, QParams, QuantSpec

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]

_COLUMNS, _ROWS = 256, 256
_HALVES = 2
_LEAST = 32  # in fewer, which rows are clipped by the range of the others is chance, and costs more than a fold gains
_NOISE_DB = 4.0  # of a gain that a single row would show; measured on draws of 16 to 512 rows
_ALIKE = 8  # the rows of a sample are alike: more of them tell no more
_TIE = 1e-6  # rows that followed a fold are rounded to float32


@dataclass(frozen=True, eq=False)
class Half:
    """Rows that are judged [R, C], of so many samples, and what is known without them: `fitted` rows and channels' `extremes`."""

    judged: F32
    fitted: RowsStat
    extremes: MinMaxStat
    samples: int = 1


TOO_FEW = f"too few rows to judge by ({_LEAST} at least); give more samples"
Fit = Callable[[Half], tuple[F64, F64]]
"""(t, r), both [C], made without the judged rows of a half."""


@dataclass(frozen=True)
class Types:
    """How the layer's input is quantized, and the type of its weight."""

    activation: QuantSpec
    weight: QType


def halves(stat: MinMaxStat, rows: RowsStat) -> list[Half]:
    """Both halves of the rows, by sample (by row where one sample holds them all); none of fewer than 32 rows."""
    if len(rows.rows) < _LEAST:
        return []
    number = rows.ids[:, 0] if len(np.unique(rows.ids[:, 0])) > 1 else rows.ids[:, 1]
    # Strides in the data may share a factor with the halves: ranks do not.
    place = np.unique(number, return_inverse=True)[1] % _HALVES
    return [_half(stat, rows, place == i) for i in range(_HALVES)] if np.ptp(place) else []


def _half(stat: MinMaxStat, rows: RowsStat, judged: NDArray[np.bool_]) -> Half:
    seen, fitted = rows.rows[judged], replace(rows, keys=rows.keys[~judged], ids=rows.ids[~judged], rows=rows.rows[~judged])
    lo, hi = -_largest_without(-stat.lo, -seen, -fitted.rows, rows.full), _largest_without(stat.hi, seen, fitted.rows, rows.full)
    samples = len(np.unique(rows.ids[judged, 0]))
    return Half(seen[:_ROWS].astype(np.float32), fitted, MinMaxStat(lo, hi), samples)


def _largest_without(largest: F64, seen: NDArray[np.floating], fitted: NDArray[np.floating], sampled: bool) -> F64:
    """Largest value [C] of all rows but the `seen` ones: it stands where none of those attains it.

    Elsewhere it is the largest of the `fitted` rows.  If these are only a sample of the others, that is too low: the gap between
    the two largest values of an exponential tail does not depend on how many there are (Renyi 1953), so theirs is taken off.
    """
    second, first = np.partition(np.concatenate([fitted, fitted[:1]]), -2, axis=0)[-2:].astype(np.float64)
    rest = np.maximum(first, largest - (first - second)) if sampled else first
    attained = seen.max(0) >= largest - _TIE * np.abs(largest)
    return np.where(attained, rest, largest)


@dataclass(frozen=True, eq=False)
class Judge:
    """What folds of a site are worth: the error of its layers' output on rows that they were not fitted to.

    `parts` judge each other; `weight` is [C, N], the layers side by side.
    """

    parts: list[Half]
    weight: F64
    types: Types

    def error(self, fit: Fit) -> float:
        """Sum of squared errors of the output over the judged rows, each half with what `fit` makes of the other."""
        return sum(_output_error(p, y, self._columns, *fit(p), self.types) for p, y in zip(self.parts, self._exact, strict=True))

    def gain_db(self, fit: Fit) -> float:
        """How much lower the error is than without a fold, in dB."""
        return decibels(self._unfolded, self.error(fit))

    @property
    def noise_db(self) -> float:
        """What gains on so few rows of so few samples may be by chance, in dB."""
        rows, samples = sum(len(p.judged) for p in self.parts), sum(p.samples for p in self.parts)
        return _NOISE_DB / float(np.sqrt(max(1, min(rows, _ALIKE * samples))))

    @cached_property
    def _unfolded(self) -> float:
        return self.error(lambda _: (np.zeros(len(self.weight)), np.ones(len(self.weight))))

    @cached_property
    def _columns(self) -> F64:
        return self.weight[:, :: max(1, self.weight.shape[1] // _COLUMNS)]

    @cached_property
    def _exact(self) -> list[F32]:
        narrow = self._columns.astype(np.float32)
        return [part.judged @ narrow for part in self.parts]


def decibels(before: float, after: float) -> float:
    """By how many dB an error fell."""
    return 10 * float(np.log10((before + 1e-30) / (after + 1e-30)))


def _output_error(half: Half, exact: F32, w: F64, t: F64, r: F64, types: Types) -> float:
    """|| Q((x - t) / r) Q(diag(r) W) - (x - t) W ||^2 over the judged rows x; `exact` is x W."""
    spec = types.activation
    method = _range_method(spec)
    rows_matter = method != "minmax" or _searches_scales(types.weight)
    fitted = half.fitted.mapped(t, r) if rows_matter else half.fitted
    found = choose(method, spec, Seen(half.extremes.mapped(t, r), fitted), ())
    a, b = ((half.judged - t) / r).astype(np.float32), (w * r[:, None]).astype(np.float32)
    qa = fake_quant(a, qparams_from_range(found.lo, found.hi, spec.qtype, spec.symmetric), spec.qtype)
    qb = fake_quant(b, _weight_scales(b, fitted.rows, types.weight), types.weight, PerAxis(1))
    residual = qa @ qb - (a @ b if np.any(t) else exact)
    return float(np.einsum("ij,ij->", residual, residual))


def _range_method(spec: QuantSpec) -> str:
    """As `annotate` below 8 bit.  At 8 bit a range that clips gains little, and what it costs in the rare rows that hold
    massive values cannot be seen in a sample: there the range holds all extremes."""
    return "minmax" if spec.qtype.bits >= 8 else automatic(spec)


def _searches_scales(qtype: QType) -> bool:
    return qtype.bits < 8 and qtype.family == "int"


def _weight_scales(w: F32, x: NDArray[np.floating], qtype: QType) -> QParams:
    """As `rtn`: clipping searched below 8 bit."""
    if not _searches_scales(qtype):
        top = np.abs(w).max(0).astype(np.float64)
        return qparams_from_range(-top, top, qtype, True)
    energy = np.square(x, dtype=np.float64).mean(0)[:, None] + 1e-12
    scale = weight_mse_scale(w, qtype, 1, energy)
    return QParams(scale, np.zeros(scale.shape, np.int64))
