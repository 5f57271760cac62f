"""Clipping ranges: from statistics (min-max, percentile, least squares) and, for weights, from the values themselves.

Everything here returns a float64 pair (lo, hi) for `affine.qparams_from_range`, or a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.quant.affine import fake_quant, qparams_from_range, round_codes, scale_shape
from qcompile.quant.qtype import QType
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor

F64 = NDArray[np.float64]

_CHUNK = 1 << 16


class HasRange(Protocol):
    """A statistic that knows the exact extremes: `lo` and `hi` of equal shape."""

    @property
    def lo(self) -> F64: ...
    @property
    def hi(self) -> F64: ...


class HasCounts(HasRange, Protocol):
    """A histogram: bin i holds `counts[i]` values of [`edges[i]`, `edges[i + 1]`)."""

    @property
    def counts(self) -> NDArray[np.int64]: ...
    @property
    def edges(self) -> F64: ...


def minmax(stat: HasRange) -> tuple[F64, F64]:
    """The exact extremes (per tensor: shape []; per channel: shape [C])."""
    return stat.lo, stat.hi


def percentile(hist: HasCounts, p: float, symmetric: bool = False) -> tuple[F64, F64]:
    """The (100 - p)-th and p-th percentile (p in (50, 100], e.g. 99.99), linear inside a bin.

    `symmetric` takes the p-th percentile m of |x| and returns (-m, m).

    Raises:
        ValueError: p outside (50, 100], or an empty histogram.
    """
    if not 50 < p <= 100:
        raise ValueError(f"a percentile must be in (50, 100], got {p}")
    _require_values(hist)
    if symmetric:
        top = _absolute_quantile(hist, p / 100)
        return np.asarray(-top), np.asarray(top)
    lo, hi = _quantile(hist, 1 - p / 100, "right"), _quantile(hist, p / 100, "left")
    return np.clip(lo, hist.lo, hist.hi), np.clip(hi, hist.lo, hist.hi)


Function = Callable[[F64], F64]
"""Of every element by itself, any shape."""


def mse(hist: HasCounts, qtype: QType, symmetric: bool = True, seen: Function | None = None) -> tuple[F64, F64]:
    """The clipping range with the least squared quantization error over the histogram (bin centres as values).

    Symmetric: one threshold, searched geometrically down to max/256 and then linearly.  Asymmetric: the two ends
    in turn.  Never worse than min-max on the histogram.  The error is that of `seen(x)` if the tensor is only seen through
    such a function: a hard swish behind it wastes no codes below -3, where it is 0.

    Raises:
        ValueError: an empty histogram.
    """
    _require_values(hist)
    centres = np.clip((hist.edges[:-1] + hist.edges[1:]) / 2, hist.lo, hist.hi)
    filled = hist.counts > 0
    error = _histogram_error(centres[filled], hist.counts[filled].astype(np.float64), qtype, symmetric, seen)
    top = float(max(-hist.lo, hist.hi, 0.0))
    if symmetric or qtype.family == "float":
        best = _search(lambda t: error(-t, t), top)
        return np.asarray(-best), np.asarray(best)
    lo, hi = max(0.0, -float(hist.lo)), max(0.0, float(hist.hi))
    full = lo, hi
    for _ in range(2):
        hi = _search(lambda t, lo=lo: error(np.full_like(t, -lo), t), full[1])
        lo = _search(lambda t, hi=hi: error(-t, np.full_like(t, hi)), full[0])
    return np.asarray(-lo), np.asarray(hi)


@dataclass(frozen=True)
class Weighted:
    """A histogram whose values count by their importance: `counts` are float64."""

    counts: Any
    edges: F64
    lo: F64
    hi: F64


def weighted(channels: Sequence[HasCounts], importance: ArrayLike) -> Weighted:
    """One histogram of channels k whose bins are multiples of powers of two, each counted `importance[k]` times.

    For the input x [C] of a linear layer W [C, N] take importance_k = sum_n W_kn^2: a quantization error e of x moves the
    output by E|e W|^2 = sum_k,l E[e_k e_l] (W W^T)_kl, which is sum_k importance_k E[e_k^2] where the errors of different
    channels are uncorrelated.  So `mse` of this histogram minimises the error of the layer's output.

    Raises:
        ValueError: not one importance a channel, or nothing was observed.
    """
    share = np.asarray(importance, np.float64)
    if share.shape != (len(channels),):
        raise ValueError(f"{len(channels)} channels need as many importances, got {share.shape}")
    pairs = [(c, s) for c, s in zip(channels, share, strict=True) if len(c.counts)]
    if not pairs:
        raise ValueError("the histograms are empty: nothing was observed")
    width = max(float(c.edges[1] - c.edges[0]) for c, _ in pairs)
    places = [np.floor(c.edges[:-1] / width).astype(np.int64) for c, _ in pairs]
    first, last = min(int(p[0]) for p in places), max(int(p[-1]) for p in places)
    counts = np.zeros(last - first + 1)
    for (channel, s), place in zip(pairs, places, strict=True):
        np.add.at(counts, place - first, s * channel.counts)
    lo, hi = min(float(c.lo) for c, _ in pairs), max(float(c.hi) for c, _ in pairs)
    return Weighted(counts, np.arange(first, last + 2, dtype=np.float64) * width, np.asarray(lo), np.asarray(hi))


def weighted_values(x: NDArray[Any], importance: ArrayLike, bins: int = 2048) -> Weighted:
    """The same from rows of values [R, C], in `bins` equal bins over their range."""
    values = np.asarray(x, np.float64)
    share = np.broadcast_to(np.asarray(importance, np.float64), values.shape)
    counts, edges = np.histogram(values, bins, weights=share)
    return Weighted(counts, np.asarray(edges, np.float64), np.asarray(values.min()), np.asarray(values.max()))


def output_error(x: NDArray[Any], w: NDArray[Any], lo: ArrayLike, hi: ArrayLike, qtype: QType, symmetric: bool = True) -> float:
    """|(Q(x) - x) w|^2 / |x w|^2 for rows x [R, K] quantized over [lo, hi] and weights w [K, N]; 0 where x w is 0."""
    exact = np.asarray(x, np.float32)
    error = (fake_quant(exact, qparams_from_range(lo, hi, qtype, symmetric), qtype) - exact) @ np.asarray(w, np.float32)
    size = float(np.square(exact @ np.asarray(w, np.float32), dtype=np.float64).sum())
    return float(np.square(error, dtype=np.float64).sum()) / size if size else 0.0


def histogram_error(hist: HasCounts, lo: ArrayLike, hi: ArrayLike, qtype: QType, symmetric: bool = True) -> float:
    """Squared error of all values of a histogram (bin centres) quantized over [lo, hi]."""
    centres = np.clip((hist.edges[:-1] + hist.edges[1:]) / 2, hist.lo, hist.hi)
    filled = hist.counts > 0
    error = _histogram_error(centres[filled], hist.counts[filled].astype(np.float64), qtype, symmetric)
    return float(error(np.reshape(np.asarray(lo, np.float64), 1), np.reshape(np.asarray(hi, np.float64), 1))[0])


def weight_mse_scale(
    w: NDArray[Any],
    qtype: QType,
    axis: int | Granularity,
    importance: NDArray[Any] | None = None,
    min_ratio: float = 0.2,
) -> F64:
    """Symmetric scales that minimise sum(importance * (w - fake_quant(w))^2) for each channel or block.

    `axis` is the output-channel axis of `w` or a granularity; `importance` broadcasts against `w` (the diagonal of
    the input's second moment, as [K, 1] for a [K, N] weight).  Candidates are `ratio * max|w| / qmax` with ratios
    from `min_ratio` to 1, coarse (steps of 0.05) then fine (0.01); 1 is among them, so no channel gets worse
    than min-max.  Returns float64 of `affine.scale_shape(w.shape, granularity)`.
    """
    granularity = PerAxis(axis % w.ndim) if isinstance(axis, int) else axis
    groups = _grouped(np.asarray(w, np.float32), granularity)
    weights = None if importance is None else _grouped(_like(importance, w), granularity)
    scales = np.empty(len(groups), np.float64)
    step = max(1, _CHUNK // max(1, groups.shape[1]))
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        scales[part] = _best_scales(groups[part], qtype, None if weights is None else weights[part], min_ratio)
    return scales.reshape(scale_shape(w.shape, granularity))


def _require_values(hist: HasCounts) -> None:
    if not hist.counts.sum():
        raise ValueError("the histogram is empty: nothing was observed")


def _quantile(hist: HasCounts, q: float, side: Literal["left", "right"]) -> F64:
    """The value below which the share q lies; over a run of empty bins its lower end (`left`) or upper end (`right`)."""
    cumulative = np.cumsum(hist.counts)
    target = q * cumulative[-1]
    i = min(int(np.searchsorted(cumulative, target, side)), len(cumulative) - 1)
    inside = 1 - (cumulative[i] - target) / hist.counts[i] if hist.counts[i] else 1.0
    return np.asarray(hist.edges[i] + max(0.0, inside) * (hist.edges[i + 1] - hist.edges[i]))


def _absolute_quantile(hist: HasCounts, q: float) -> float:
    """Quantile of |x|: the smallest m so that bins cut at -m and m hold the share q (bins are linear inside)."""
    cumulative = np.concatenate([[0], np.cumsum(hist.counts)]).astype(np.float64)
    ends = np.unique(np.abs(np.concatenate([hist.edges, [0.0]])))
    inside = np.interp(ends, hist.edges, cumulative) - np.interp(-ends, hist.edges, cumulative)
    k = int(np.searchsorted(inside, q * cumulative[-1]))
    top = float(max(-hist.lo, hist.hi, 0.0))
    if k == 0 or k >= len(ends):
        return min(float(ends[min(k, len(ends) - 1)]), top)
    share = (q * cumulative[-1] - inside[k - 1]) / (inside[k] - inside[k - 1])
    return min(float(ends[k - 1] + share * (ends[k] - ends[k - 1])), top)


def _histogram_error(
    x: F64, counts: F64, qtype: QType, symmetric: bool, seen: Function | None = None
) -> Callable[[F64, F64], F64]:
    """A function of candidate ranges lo[n], hi[n] that gives their squared error [n]."""
    exact = x if seen is None else seen(x)

    def error(lo: F64, hi: F64) -> F64:
        qparams = qparams_from_range(lo, hi, qtype, symmetric)
        scale, zero_point = qparams.scale[:, None], qparams.zero_point[:, None]
        ratio = np.clip(x / scale, qtype.qmin - zero_point, qtype.qmax - zero_point)
        values = round_codes(ratio.astype(np.float32), qtype).astype(np.float64) * scale
        return np.square((values if seen is None else seen(values)) - exact) @ counts

    return error


def _search(error: Callable[[F64], F64], top: float) -> float:
    """Best threshold in (0, top]: a geometric sweep over 1/256..1, then a linear one around its best."""
    if top <= 0:
        return 0.0
    coarse = top * np.exp2(-np.arange(65) / 8)
    best = coarse[int(np.argmin(error(coarse)))]
    fine = np.append(np.minimum(best * np.linspace(2**-0.125, 2**0.125, 17), top), best)
    return float(fine[int(np.argmin(error(fine)))])


def _like(importance: NDArray[Any], w: NDArray[Any]) -> NDArray[np.float32]:
    return np.broadcast_to(np.asarray(importance, np.float32), w.shape)


def _grouped(w: NDArray[np.float32], granularity: Granularity) -> NDArray[np.float32]:
    """[G, n]: one row for each scale, in the scale tensor's order; a ragged last block is padded with zeros."""
    match granularity:
        case PerTensor():
            return w.reshape(1, -1)
        case PerAxis(axis):
            return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
        case PerBlock(axis, size):
            axis %= w.ndim
            pad = [(0, -w.shape[axis] % size if i == axis else 0) for i in range(w.ndim)]
            padded = np.pad(w, pad)
            split = padded.reshape(*padded.shape[:axis], -1, size, *padded.shape[axis + 1 :])
            return np.moveaxis(split, axis + 1, -1).reshape(-1, size)


def _best_scales(w: NDArray[np.float32], qtype: QType, weights: NDArray[np.float32] | None, min_ratio: float) -> F64:
    """Best scale of each row of w [G, n]."""
    full = qparams_from_range(w.min(axis=1), w.max(axis=1), qtype).scale
    best = full.copy()
    least = _row_error(w, full, qtype, weights)
    coarse = np.arange(0.95, min_ratio - 1e-9, -0.05)
    for ratio in coarse:
        best, least = _keep_better(w, full * ratio, qtype, weights, best, least)
    centre = best.copy()
    for offset in (-0.04, -0.03, -0.02, -0.01, 0.01, 0.02, 0.03, 0.04):
        best, least = _keep_better(w, np.minimum(centre + offset * full, full), qtype, weights, best, least)
    return best


def _keep_better(
    w: NDArray[np.float32], scale: F64, qtype: QType, weights: NDArray[np.float32] | None, best: F64, least: F64
) -> tuple[F64, F64]:
    scale = scale.astype(np.float32).astype(np.float64)
    error = _row_error(w, scale, qtype, weights)
    better = error < least
    return np.where(better, scale, best), np.where(better, error, least)


def _row_error(w: NDArray[np.float32], scale: F64, qtype: QType, weights: NDArray[np.float32] | None) -> F64:
    """Squared error of each row under its scale."""
    column = scale.astype(np.float32)[:, None]
    residual: NDArray[np.float32] = np.divide(w, column, dtype=np.float32)
    np.clip(residual, qtype.qmin, qtype.qmax, out=residual)
    residual = round_codes(residual, qtype, out=residual)
    residual *= column
    residual -= w
    if weights is None:
        return np.einsum("ij,ij->i", residual, residual).astype(np.float64)
    residual *= residual
    return np.einsum("ij,ij->i", residual, weights).astype(np.float64)
