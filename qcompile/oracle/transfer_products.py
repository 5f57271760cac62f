"""How sums of products map intervals: bounded from the actual weights, per output channel, for every partial sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompile.oracle import interval
from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range, between, corners, exact
from qcompile.oracle.linear import centered
from qcompile.oracle.qlinear import BIAS, SUMS, along_channels, as_sum
from qcompile.oracle.scene import Array, Scene, Transfer, Unbounded


def _shifted(x: Range, zero: Array | None) -> Range:
    """x - zero as one interval."""
    if zero is None or not zero.size:
        return x.hull
    return between(x.low - int(zero.max()), x.high - int(zero.min()))


def _terms(weight: NDArray[np.int64], x: Range, axes: tuple[int, ...], kept: tuple[int, ...]) -> Range:
    """The range of every partial sum of weight * x over `axes`, in any order: a term adds nothing or its extreme."""
    low, high = min(x.low, 0), max(x.high, 0)
    up, down = np.maximum(weight, 0).sum(axis=axes), np.minimum(weight, 0).sum(axis=axes)
    lo = exact(up) * low + exact(down) * high
    hi = exact(up) * high + exact(down) * low
    return Range(exact(lo).reshape(kept), exact(hi).reshape(kept))


def _conv(s: Scene, op: Op) -> Range:
    """Per output channel from the weights; x - zero point is 0 in the padding, so every term may be missing."""
    weight, zero = s.constant(op, 1), s.constant(op, 2)
    if weight is None or (s.given(op, 2) and zero is None):
        raise Unbounded("its weights or zero points are computed")
    w = centered(weight, s.constant(op, 3), 0)
    axes, kept = tuple(range(1, w.ndim)), (1, len(w), *(1,) * (w.ndim - 2))
    return _terms(w, _shifted(s.of(op, 0), zero), axes, kept)


def _matmul_integer(s: Scene, op: Op) -> Range:
    zeros = [s.constant(op, slot) for slot in (2, 3)]
    if any(s.given(op, slot) and z is None for slot, z in zip((2, 3), zeros, strict=True)):
        raise Unbounded("its zero points are computed")
    return _product(s, op, zeros)


def _product(s: Scene, op: Op, zeros: list[Array | None]) -> Range:
    a, b = (s.constant(op, slot) for slot in (0, 1))
    if b is not None and b.ndim >= 2:
        w = centered(b, zeros[1], -1)
        return _terms(w, _shifted(s.of(op, 0), zeros[0]), (w.ndim - 2,), (*w.shape[:-2], 1, w.shape[-1]))
    if a is not None and a.ndim >= 2:
        w = centered(a, zeros[0], -2)
        return _terms(w, _shifted(s.of(op, 1), zeros[1]), (w.ndim - 1,), (*w.shape[:-1], 1))
    x, y = (_shifted(s.of(op, slot), zeros[slot]) for slot in (0, 1))
    term = interval.join([corners(lambda p, q: p * q, x, y), between(0, 0)])
    return interval.times_count(term, *s.counts(op, (_length(s, op),)))


def _length(s: Scene, op: Op) -> int | None:
    """The reduction length of a product, from either operand."""
    first = s.shape(op.inputs[0])[-1]
    second = s.shape(op.inputs[1])
    return first if first is not None else second[-2 if len(second) > 1 else 0]


def _matmul(s: Scene, op: Op) -> Range:
    return _product(s, op, [None, None])


def _qlinear(s: Scene, op: Op) -> Range:
    """Any code; the sums inside, bias included, must fit int32."""
    inner, zero = as_sum(op), s.constant(op, 7)
    if zero is None:
        raise Unbounded("its zero points are computed")
    total = PRODUCTS[inner.type](s, inner)
    if s.given(op, BIAS):
        bias = s.constant(op, BIAS)
        if bias is None:
            raise Unbounded("its bias is computed")
        added = exact(along_channels(bias, op, len(s.shape(op.outputs[0]))))
        total = Range(exact(total.lo + added), exact(total.hi + added))
    s.sums.append((inner, total))
    if not total.within(-(1 << 31), (1 << 31) - 1):
        s.problem("overflow32", f"the sums inside can be {total.low} .. {total.high}, which int32 cannot hold")
    return between(int(np.iinfo(zero.dtype).min), int(np.iinfo(zero.dtype).max))


PRODUCTS: dict[str, Transfer] = {
    "ConvInteger": _conv,
    "MatMulInteger": _matmul_integer,
    "MatMul": _matmul,
    **dict.fromkeys(SUMS, _qlinear),
}
