"""Companded codes: unevenly spaced values for softmax and GELU outputs, which crowd near zero.

Every kind is the same thing, a `Codebook`: thresholds and one value for each interval between them.  What differs is how the
levels are laid out (`codebook`) and which of their parameters have the least error on calibration rows (`fit`).
Honest types have 2^bits values; `paper` types have the published ones (the log family then spends an extra one on zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.quant.qtype import QType, qtype
from qcompile.quant.spec import QParams

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Error = Callable[[F64], float]
GELU_MINIMUM = 0.16997124254703522
ADALOG_RESOLUTION = 37
_QUANTILES = (0.999, 0.9999, 0.99999, 1.0)
_ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
_BASES = range(1, 139)
_PAPER_BASES = range(10, 139)
_DEEPEST_SPLIT = 19


@dataclass(frozen=True, eq=False)
class Codebook:
    """`values` float64 [n] of the codes 0 .. n - 1, and ascending `thresholds` float32 [n - 1] between them.

    A number that equals thresholds[i] has a code above i: ties are part of the definition.
    """

    thresholds: F32
    values: F64

    def codes(self, x: ArrayLike) -> NDArray[np.int64]:
        """Codes of `x`, compared in float32."""
        return np.searchsorted(self.thresholds, np.asarray(x, np.float32), side="right").astype(np.int64)

    def fake_quant(self, x: ArrayLike) -> F64:
        """The value of each number's code."""
        return self.values[self.codes(x)]


def companded_type(kind: str, bits: int, paper: bool = False) -> QType:
    """The code type of one of `qtype.COMPANDED`."""
    return qtype(f"{kind}u{bits}{'p' if paper else ''}")


def kind_of(coded: QType) -> tuple[str, int, bool]:
    """(kind, bits, whether the levels are the paper's) of a companded type."""
    kind, _, width = coded.name.partition("@")[0].rpartition("u")
    return kind, coded.bits, width.endswith("p")


def qparams(scale: float, *curve: float) -> QParams:
    """A scale, and what else the kind has parameters for."""
    return QParams(np.asarray(scale, np.float64), np.zeros((), np.int64), curve=curve)


def codebook(coded: QType, params: QParams) -> Codebook:
    """The levels of a companded type; `params.scale` is the largest value, `params.curve` by kind:

    log2, log-sqrt2, uniform -    adalog (q, shift, offset)    sulq (lowest log2, highest log2, eta)    tan (a,)
    twin (m,)    twin-gelu (step of the negative values,); there the scale is the step of the positive ones
    """
    kind, bits, paper = kind_of(coded)
    s, curve = float(params.scale), params.curve
    match kind:
        case "log2":
            return _logarithmic(s, 1.0, bits, paper)
        case "log-sqrt2":
            return _logarithmic(s, 2.0, bits, paper)
        case "adalog":
            return _adaptive(s, round(curve[0]), curve[1], curve[2], bits, paper)
        case "sulq":
            return _shifted(curve[0], curve[1], curve[2], bits, paper)
        case "tan":
            return _tangent(s, curve[0], bits)
        case "twin":
            return _twin(s, round(curve[0]), bits, paper)
        case "twin-gelu":
            half = 2 ** (bits - 1)
            return _joined(_even(-half, 0, curve[0]), _even(0, half - 1, s))
        case _:
            return _even(0, 2**bits - 1, s / (2**bits - 1))


# ---- levels ---------------------------------------------------------------------------------------------------------


def _logarithmic(s: float, steps: float, bits: int, paper: bool) -> Codebook:
    """s 2^(-k / steps), rounded in the logarithm, and 0 (RepQ-ViT, arXiv:2212.08254, eq. 11-12; FQ-ViT, arXiv:2111.13824)."""
    count = 2**bits - (0 if paper else 1)
    falling = np.arange(count - 1, -1, -1, dtype=np.float64)
    values = s * np.exp2(-falling / steps)
    thresholds = np.maximum(s * np.exp2(-(falling + 0.5) / steps), np.finfo(np.float32).tiny)  # 0 keeps the code of 0
    return Codebook(thresholds.astype(np.float32), np.concatenate([[0.0], values]))


def _adaptive(s: float, q: int, shift: float, offset: float, bits: int, paper: bool) -> Codebook:
    """Base 2^(q / 37) of x + shift, `offset` taken off the value (AdaLog, arXiv:2407.12951).

    The published multipliers 2^(-j / 37) are rounded to multiples of 1 / (2^(b + 1) - 2), up to 0.014 off.
    """
    base = _logarithmic(s, ADALOG_RESOLUTION / q, bits, paper)
    values = base.values
    if paper:
        whole, part = np.divmod(q * np.arange(len(values) - 2, -1, -1), ADALOG_RESOLUTION)
        grid = 2 ** (bits + 1) - 2
        short = np.rint(np.exp2(-part / ADALOG_RESOLUTION) * grid) / grid
        values = np.concatenate([[0.0], s * np.exp2(-whole.astype(np.float64)) * short])
    return Codebook((base.thresholds.astype(np.float64) - shift).astype(np.float32), values - offset)


def _shifted(lowest: float, highest: float, eta: float, bits: int, paper: bool) -> Codebook:
    """Even steps of log2(P + eta) (SULQ of I&S-ViT, arXiv:2311.10126).

    The published decoder rounds the exponent to an integer again, which merges levels (8 of 16 are left at eta = 0.01).
    """
    exponents = np.linspace(lowest, highest, 2**bits)
    between = (exponents[:-1] + exponents[1:]) / 2
    return Codebook((np.exp2(between) - eta).astype(np.float32), np.exp2(np.rint(exponents) if paper else exponents) - eta)


def _tangent(s: float, a: float, bits: int) -> Codebook:
    """Even steps of tan(a (P / s - 1/2)): fine near 0 and near s (TanQ of DopQ-ViT, reconstructed from the abstract)."""
    end = math.tan(a / 2)
    steps: F64 = np.linspace(-end, end, 2**bits)
    thresholds = s * (0.5 + np.arctan((steps[:-1] + steps[1:]) / 2) / a)
    angles: F64 = np.arctan(steps)
    return Codebook(thresholds.astype(np.float32), s * (0.5 + angles / a))


def _twin(s: float, m: int, bits: int, paper: bool) -> Codebook:
    """Steps D1 = D2 / 2^m below the split, D2 above, 2^(b-1) codes each (PTQ4ViT, arXiv:2111.12293, eq. 7-8, piecewise).

    paper: D2 = 1 / 2^(b-1), split at 2^(b-1) D1 even where that is less than D2 / 2.  Else D2 = s / (2^(b-1) - 1), so that s has
    a code, and the split lies half-way between the last fine and the next coarse value.
    """
    low, high, split = twin_branches(s, m, bits, paper)
    fine, coarse = _even(0, low[1], low[0]), _even(0, high[1], high[0])
    below, above = fine.thresholds < np.float32(split), coarse.thresholds > np.float32(split)
    first = int(coarse.codes(split))
    thresholds = np.concatenate([fine.thresholds[below], [np.float32(split)], coarse.thresholds[above]])
    return Codebook(thresholds, np.concatenate([fine.values[: below.sum() + 1], coarse.values[first:]]))


def twin_branches(s: float, m: int, bits: int, paper: bool) -> tuple[tuple[float, int], tuple[float, int], float]:
    """((D1, last code), (D2, last code), split) of a twin quantizer of probabilities."""
    half = 2 ** (bits - 1)
    coarse = 1.0 / half if paper else s / (half - 1)
    fine = coarse / 2**m
    if paper:
        return (fine, half - 1), (coarse, half - 1), half * fine
    top = fine * (half - 1)
    return (fine, half - 1), (coarse, half - 1), (top + coarse * (math.floor(top / coarse) + 1)) / 2


def _even(first: int, last: int, step: float) -> Codebook:
    """step * k for k in first..last, ties to even k as QuantizeLinear has them."""
    codes = np.arange(first, last + 1)
    ties = ((codes[:-1] + 0.5) * step).astype(np.float32)
    down = codes[:-1] % 2 == 0
    return Codebook(np.where(down, np.nextafter(ties, np.float32(np.inf)), ties), (codes * step).astype(np.float64))


def _joined(below: Codebook, above: Codebook) -> Codebook:
    """Two codebooks that share the value at which one ends and the other begins."""
    return Codebook(np.concatenate([below.thresholds, above.thresholds]), np.concatenate([below.values[:-1], above.values]))


# ---- search ---------------------------------------------------------------------------------------------------------


def value_error(e: F64) -> float:
    """Mean squared error of the values."""
    return float(np.square(e).mean())


def product_error(spread: float, bias: float) -> Error:
    """Mean squared error of e V per row for tokens of V [N, d] that vary independently about their mean.

    E|e V|^2 = spread sum(e^2) + bias (sum e)^2, spread = sum_d Var[V_d], bias = sum_d E[V_d]^2.
    """
    return lambda e: float((spread * np.square(e).sum(-1) + bias * np.square(e.sum(-1))).mean())


def fit(coded: QType, x: ArrayLike, error: Error = value_error, shift: float = 0.0) -> QParams:
    """The parameters of `coded` with the least `error` on rows x [rows, C]; `shift` is AdaLog's for GELU outputs."""
    rows = np.asarray(x, np.float64)

    def loss(params: QParams) -> float:
        return error(codebook(coded, params).fake_quant(rows) - rows)

    best = min(_candidates(coded, rows, shift), key=loss)
    return min([best, *_finer(coded, best)], key=loss)


def _candidates(coded: QType, x: F64, shift: float) -> Iterator[QParams]:
    kind, bits, paper = kind_of(coded)
    top = float(x.max(initial=0.0)) or 1.0
    tops = (1.0,) if paper else tuple(dict.fromkeys((top, 1.0)))
    match kind:
        case "adalog" if shift:
            high = np.linspace(np.quantile(x[x > 0], 0.9) if np.any(x > 0) else 1.0, top, 12)
            yield from (qparams(float(s) + shift, q, shift, shift) for s, q in product(high, _bases(paper)[::8]))
        case "adalog":
            yield from (qparams(s, q, 0.0, 0.0) for s, q in product(tops, _bases(paper)[::4]))
        case "sulq":
            yield from (_sulq_params(x, eta) for eta in _ETAS)
        case "tan":
            yield from (qparams(s, math.pi * (1 - 2.0 ** (-i / 2))) for s, i in product(tops, range(2, 21)))
        case "twin":
            yield from (qparams(s, m) for s, m in product(tops, range(_DEEPEST_SPLIT + 1)))
        case "twin-gelu":
            half = 2 ** (bits - 1)
            yield from (qparams(top / half * float(r), GELU_MINIMUM / half) for r in np.linspace(0.1, 1.2, 56))
        case _:
            yield from (qparams(float(s)) for s in np.quantile(x, _QUANTILES) if s > 0)
            yield qparams(top)


def _sulq_params(x: F64, eta: float) -> QParams:
    low, high = math.log2(float(x.min()) + eta), math.log2(float(x.max()) + eta)
    return qparams(float(x.max()) or 1.0, low, max(high, low + 1e-6), eta)


def _bases(paper: bool) -> range:
    """q of the base 2^(q / 37); the published search begins at 10, too coarse for more than 4 bits."""
    return _PAPER_BASES if paper else _BASES


def _finer(coded: QType, best: QParams) -> list[QParams]:
    """AdaLog's bases between the ones that were tried."""
    kind, _, paper = kind_of(coded)
    if kind != "adalog":
        return []
    q, shift, offset = best.curve
    near = [b for b in range(round(q) - 7, round(q) + 8) if b in _bases(paper)]
    return [qparams(float(best.scale), b, shift, offset) for b in near]
