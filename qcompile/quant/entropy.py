"""The range with the least information lost: KL divergence, as TensorRT's entropy calibrator.

S. Migacz, "8-bit Inference with TensorRT", GTC 2017: P is the histogram clipped to a candidate range, the outliers added to
its ends; Q is the same bins merged into the levels of the type and spread again over the bins that held something.
The range with the least KL(P || Q) = sum P log(P / Q) wins.  The bin at 0 counts as much as its neighbour (as in NVIDIA's
pytorch-quantization): the zeros of a ReLU are exact in every range and would outweigh all other values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompile.quant.qtype import QType
from qcompile.quant.ranges import HasCounts, minmax

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_SMOOTH = 1e-4
_BLOCK = 1 << 20
_ROUNDS = 2


def entropy(hist: HasCounts, qtype: QType, symmetric: bool = True) -> tuple[F64, F64]:
    """The range (lo, hi) with the least KL divergence, from a histogram whose bins meet at 0.

    Symmetric: one threshold over the histogram of |x|, 2^(bits-1) levels.  Asymmetric: the two ends in turn, 2^bits levels.
    The smallest candidate has as many bins as the type has levels; histograms with no more bins give min-max.

    Raises:
        ValueError: an empty histogram, or a type that is not an integer.
    """
    if qtype.family != "int":
        raise ValueError(f"the entropy of {qtype.name} is not defined: its levels are not equal; use mse")
    if not hist.counts.sum():
        raise ValueError("the histogram is empty: nothing was observed")
    if symmetric:
        top = _threshold(hist, 2 ** (qtype.bits - 1))
        return np.asarray(-top), np.asarray(top)
    return _window(hist, 2**qtype.bits)


def _threshold(hist: HasCounts, levels: int) -> float:
    top = float(max(-hist.lo, hist.hi, 0.0))
    counts, width = _folded(hist)
    if len(counts) <= levels:
        return top
    counts[0] = counts[1]
    stops = np.arange(levels, len(counts) + 1)
    best = stops[int(np.argmin(_divergence(counts, np.zeros_like(stops), stops, levels)))]
    return top if best == len(counts) else min(float(best) * width, top)


def _window(hist: HasCounts, levels: int) -> tuple[F64, F64]:
    """The upper end, then the lower one, twice; 0 stays inside, as quantization widens the range to it anyway."""
    counts, edges = hist.counts.astype(np.float64), hist.edges
    if len(counts) <= levels:
        return minmax(hist)
    zero = int(np.clip(np.searchsorted(edges, 0.0), 0, len(counts)))
    if zero + 1 < len(counts) and edges[zero] == 0:
        counts[zero] = counts[zero + 1]
    start, stop = 0, len(counts)
    for _ in range(_ROUNDS):
        stops = np.arange(max(start + levels, zero), len(counts) + 1)
        if len(stops):
            stop = int(stops[np.argmin(_divergence(counts, np.full_like(stops, start), stops, levels))])
        starts = np.arange(0, min(stop - levels, zero) + 1)
        if len(starts):
            start = int(starts[np.argmin(_divergence(counts, starts, np.full_like(starts, stop), levels))])
    return np.maximum(edges[start], hist.lo), np.minimum(edges[stop], hist.hi)


def _folded(hist: HasCounts) -> tuple[F64, float]:
    """Counts of |x| from 0 on, and the bin width."""
    edges, counts = hist.edges, hist.counts
    width = float(edges[1] - edges[0])
    index = np.rint(edges[:-1] / width).astype(np.int64)
    places = np.where(index >= 0, index, -index - 1)
    folded = np.zeros(int(places.max()) + 1)
    np.add.at(folded, places, counts)
    return folded, width


def _divergence(counts: F64, starts: I64, stops: I64, levels: int) -> F64:
    """KL(P || Q) of each candidate [starts[i], stops[i]) in nats."""
    step = max(1, _BLOCK // levels)
    parts = [_block(counts, starts[i : i + step], stops[i : i + step], levels) for i in range(0, len(starts), step)]
    return np.concatenate(parts)


def _block(counts: F64, starts: I64, stops: I64, levels: int) -> F64:
    total = counts.sum()
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    logs = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    bounds = starts[:, None] + np.arange(levels + 1) * (stops - starts)[:, None] // levels
    merged, spread = np.diff(sums[bounds], axis=1), np.diff(filled[bounds], axis=1)
    inside = sums[stops] - sums[starts]
    density = np.where(spread > 0, merged / np.maximum(spread, 1), 1.0)
    cross = (merged * np.log(density)).sum(1)  # sum of P log Q over the bins that hold something, without the outliers
    own = logs[stops] - logs[starts]
    for ends, outliers, column in ((stops - 1, total - sums[stops], -1), (starts, sums[starts], 0)):
        at = counts[ends]
        own += _xlogx(at + outliers) - _xlogx(at)
        cross += outliers * np.log(np.where(at > 0, density[:, column], _SMOOTH))
    # P is normalised by all values, Q by those inside.
    return (own - cross) / total - np.log(total) + np.log(np.maximum(inside, _SMOOTH))


def _xlogx(x: F64) -> F64:
    return x * np.log(np.where(x > 0, x, 1.0))
