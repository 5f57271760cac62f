"""Which migration strength pays: the layer's output error on rows that the ratios and the range were not fitted to.

r_j and the range are extremes of calibration rows, so the rows that set them are never clipped and every alpha looks better on
them than it is: with few rows (a time embedding has one a sample) the error on new rows rises while that on the fitted ones
falls.  Each half of the samples is therefore judged with the ratios and the range of the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
Ratios = Callable[[MinMaxStat, float], tuple[F64, F64]]

_COLUMNS, _ROWS = 256, 256
_COARSE, _STEP = (0.0, 0.3, 0.5, 0.7, 0.9), 0.1
_HALVES = 2
_TIE = 1e-6  # rows that followed a fold are rounded to float32


@dataclass(frozen=True, eq=False)
class Half:
    """Rows that are judged [R, C], and what is known without them: `fitted` rows and per-channel `extremes`."""

    judged: F32
    fitted: RowsStat
    extremes: MinMaxStat


@dataclass(frozen=True)
class Types:
    """How the layer's input is quantized, and the type of its weight."""

    activation: QuantSpec
    weight: QType


def halves(stat: MinMaxStat, rows: RowsStat) -> list[Half]:
    """Both halves of the rows, by sample (by row where one sample holds them all); none of fewer than two rows."""
    count = min(_HALVES, len(rows.rows))
    number = rows.ids[:, 0] if len(np.unique(rows.ids[:, 0])) > 1 else rows.ids[:, 1]
    # Strides in the data may share a factor with the halves: ranks do not.
    place = np.unique(number, return_inverse=True)[1] % _HALVES
    return [_half(stat, rows, place == i) for i in range(count)] if count == _HALVES and np.ptp(place) else []


def _half(stat: MinMaxStat, rows: RowsStat, judged: NDArray[np.bool_]) -> Half:
    seen, fitted = rows.rows[judged], replace(rows, keys=rows.keys[~judged], ids=rows.ids[~judged], rows=rows.rows[~judged])
    lo, hi = -_largest_without(-stat.lo, -seen, -fitted.rows, rows.full), _largest_without(stat.hi, seen, fitted.rows, rows.full)
    return Half(seen[:_ROWS].astype(np.float32), fitted, MinMaxStat(lo, hi))


def _largest_without(largest: F64, seen: NDArray[np.floating], fitted: NDArray[np.floating], sampled: bool) -> F64:
    """Largest value [C] of all rows but the `seen` ones: it stands where none of those attains it.

    Elsewhere it is the largest of the `fitted` rows.  If these are only a sample of the others, that is too low: the gap between
    the two largest values of an exponential tail does not depend on how many there are (Renyi 1953), so theirs is taken off.
    """
    second, first = np.partition(np.concatenate([fitted, fitted[:1]]), -2, axis=0)[-2:].astype(np.float64)
    rest = np.maximum(first, largest - (first - second)) if sampled else first
    attained = seen.max(0) >= largest - _TIE * np.abs(largest)
    return np.where(attained, rest, largest)


def best_alpha(parts: list[Half], weight: F64, ratios: Ratios, types: Types, fixed: float | None) -> tuple[float, float]:
    """The alpha with the least error on judged rows, and its gain over alpha 0 in dB; `fixed` is the only other candidate.

    `weight` is [C, N]; `ratios` gives (t, r), both [C], of extremes and an alpha.  (0, 0) without rows to judge by.
    """
    if not parts:
        return 0.0, 0.0
    columns = weight[:, :: max(1, weight.shape[1] // _COLUMNS)]
    narrow = columns.astype(np.float32)
    exact = [part.judged @ narrow for part in parts]

    def error(alpha: float) -> float:
        return sum(_output_error(p, y, columns, *ratios(p.extremes, alpha), types) for p, y in zip(parts, exact, strict=True))

    errors = {a: error(a) for a in (_COARSE if fixed is None else (0.0, fixed))}
    best = min(errors, key=lambda a: (errors[a], a))
    if fixed is None and best > 0:
        errors |= {a: error(a) for a in (round(best - _STEP, 1), round(best + _STEP, 1))}
        best = min(errors, key=lambda a: (errors[a], a))
    return best, 10 * float(np.log10((errors[0.0] + 1e-30) / (errors[best] + 1e-30)))


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
