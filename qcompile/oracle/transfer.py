"""How each operator maps intervals: the range of its exact result, before it is stored in its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.oracle import interval
from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range, between, corners, exact, monotone
from qcompile.oracle.linear import centered
from qcompile.oracle.movement import reduced_axes
from qcompile.oracle.scene import Scene, Shape, Unbounded

Array = NDArray[Any]
LARGEST_AXIS = (1 << 31) - 1


Transfer = Callable[[Scene, Op], Range]


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def _add(s: Scene, op: Op) -> Range:
    a, b = s.of(op, 0), s.of(op, 1)
    return Range(exact(a.lo + b.lo), exact(a.hi + b.hi))


def _subtract(s: Scene, op: Op) -> Range:
    modulus = _remainder_of(s, op)
    if modulus is not None:
        return between(0, modulus - 1)
    a, b = s.of(op, 0), s.of(op, 1)
    return Range(exact(a.lo - b.hi), exact(a.hi - b.lo))


def _remainder_of(s: Scene, op: Op) -> int | None:
    """c if this is x - (x Div c) * c for a constant c > 0 and x >= 0.  Lemma: that is x mod c, in [0, c - 1]."""
    product = s.makers.get(op.inputs[1])
    if product is None or product.type != "Mul":
        return None
    for slot in (0, 1):
        quotient, factor = s.makers.get(product.inputs[slot]), s.constant(product, 1 - slot)
        if quotient is None or quotient.type != "Div" or factor is None or factor.size != 1:
            continue
        divisor, c = s.constant(quotient, 1), int(factor.reshape(()))
        same = divisor is not None and divisor.size == 1 and int(divisor.reshape(())) == c
        if same and quotient.inputs[0] == op.inputs[0] and c > 0 and s.of(op, 0).low >= 0:
            return c
    return None


def _multiply(s: Scene, op: Op) -> Range:
    """A tensor times itself is not negative."""
    a, b = s.of(op, 0), s.of(op, 1)
    found = corners(lambda x, y: x * y, a, b)
    return Range(interval.most(_smallest_square(a), exact(0)), found.hi) if op.inputs[0] == op.inputs[1] else found


def _smallest_square(a: Range) -> Array:
    away = interval.most(interval.most(a.lo, exact(-a.hi)), exact(0))  # distance of the interval from 0
    return exact(away * away)


def _divide(s: Scene, op: Op) -> Range:
    a, b = s.of(op, 0), _nonzero(s, s.of(op, 1))
    if b.low > 0 or b.high < 0:
        return corners(interval.truncated, a, b)
    reach = max(abs(a.low), abs(a.high))
    return between(-reach, reach)


def _nonzero(s: Scene, b: Range) -> Range:
    """The divisor's range without a 0 at its end."""
    if not bool(((b.lo <= 0) & (b.hi >= 0)).any()):
        return b
    s.problem("zero", f"the divisor lies in {b.low}..{b.high}")
    if b.low == 0 and b.high > 0:
        return Range(interval.most(b.lo, exact(1)), b.hi)
    return b


def _modulo(s: Scene, op: Op) -> Range:
    a, b = s.of(op, 0), _nonzero(s, s.of(op, 1))
    largest = max(abs(b.low), abs(b.high)) - 1
    signed = a if op.attributes.get("fmod", 0) else b
    reach = min(largest, max(abs(a.low), abs(a.high))) if op.attributes.get("fmod", 0) else largest
    if a.low >= 0 and b.low > 0 and a.high < b.low:
        return a.hull
    return between(-reach if signed.low < 0 else 0, reach if signed.high > 0 else 0)


def _shift(s: Scene, op: Op) -> Range:
    a, bits = s.of(op, 0), s.of(op, 1)
    if not bits.within(0, 63):
        s.problem("shift", f"the shift lies in {bits.low}..{bits.high}")
        return between(0, (1 << 64) - 1)
    if op.attributes["direction"] == "RIGHT":
        return Range(exact(a.lo >> bits.hi), exact(a.hi >> bits.lo))
    return Range(exact(a.lo << bits.lo), exact(a.hi << bits.hi))


def _clip(s: Scene, op: Op) -> Range:
    x = s.of(op, 0)
    for slot, pick in ((1, interval.most), (2, interval.least)):
        if s.given(op, slot):
            end = s.of(op, slot)
            x = Range(pick(x.lo, end.lo), pick(x.hi, end.hi))
    return x


def _many(pick: Callable[[Array, Array], Array]) -> Transfer:
    def transfer(s: Scene, op: Op) -> Range:
        first, *rest = (s.ranges[name] for name in op.inputs)
        for r in rest:
            first = Range(pick(first.lo, r.lo), pick(first.hi, r.hi))
        return first

    return transfer


def _negate(s: Scene, op: Op) -> Range:
    a = s.of(op, 0)
    return Range(exact(-a.hi), exact(-a.lo))


def _absolute(s: Scene, op: Op) -> Range:
    a = s.of(op, 0)
    away = interval.most(interval.most(a.lo, exact(-a.hi)), exact(0))
    return Range(away, interval.most(a.hi, exact(-a.lo)))


def _bitwise(s: Scene, op: Op) -> Range:
    """Of non-negative numbers: below the next power of two."""
    a, b = s.of(op, 0), s.of(op, 1)
    if a.low < 0 or b.low < 0:
        raise Unbounded("a bitwise operator reads negative numbers")
    return between(0, (1 << max(a.high, b.high).bit_length()) - 1)


def _where(s: Scene, op: Op) -> Range:
    return interval.join([s.of(op, 1), s.of(op, 2)])


def _truth(_: Scene, __: Op) -> Range:
    return between(0, 1)


def _same(s: Scene, op: Op) -> Range:
    return s.of(op, 0)


# ---- movement and reductions --------------------------------------------------------------------------------------


def _mixed(s: Scene, op: Op) -> Range:
    return s.of(op, 0).hull


def _joined(s: Scene, op: Op) -> Range:
    return interval.join([s.ranges[name].hull for name in op.inputs])


def _padded(s: Scene, op: Op) -> Range:
    fill = s.of(op, 2).hull if s.given(op, 2) else between(0, 0)
    return interval.join([s.of(op, 0).hull, fill]) if op.attributes.get("mode", "constant") == "constant" else s.of(op, 0).hull


def _transpose(s: Scene, op: Op) -> Range:
    rank = len(s.shape(op.inputs[0]))
    a, perm = s.of(op, 0).at_rank(rank), op.attributes.get("perm") or tuple(reversed(range(rank)))
    return a if a.lo.ndim != rank else Range(a.lo.transpose(perm), a.hi.transpose(perm))


def _max_pool(s: Scene, op: Op) -> Range:
    a = s.of(op, 0)
    return a if a.lo.ndim >= 3 and set(a.lo.shape[2:]) == {1} else a.hull


def _shape(s: Scene, op: Op) -> Range:
    sizes = s.shape(op.inputs[0])[op.attributes.get("start", 0) : op.attributes.get("end")]
    return Range(
        exact(np.array([0 if d is None else d for d in sizes], object)),
        exact(np.array([LARGEST_AXIS if d is None else d for d in sizes], object)),
    )


def _constant_of_shape(_: Scene, op: Op) -> Range:
    value = op.attributes.get("value")
    return between(0, 0) if value is None else interval.constant(numpy_helper.to_array(value))


def _range(s: Scene, op: Op) -> Range:
    """Positions: from the start up to the limit, or down to it."""
    return interval.join([s.of(op, 0), s.of(op, 1)]).hull


def _gather(s: Scene, op: Op) -> Range:
    """Table entries that the index can reach."""
    table, index = s.constant(op, 0), s.of(op, 1)
    if table is None:
        return s.of(op, 0).hull
    axis = int(op.attributes.get("axis", 0))
    length = table.shape[axis]
    if not index.within(-length, length - 1):
        _outside(s, op, index, length)
    first, last = max(index.low, 0), min(index.high, length - 1)
    reached = table if index.low < 0 or first > last else np.take(table, range(first, last + 1), axis=axis)
    return between(int(reached.min()), int(reached.max())) if reached.size else between(0, 0)


def _outside(s: Scene, op: Op, index: Range, length: int) -> None:
    """An index that comes straight from an input is the caller's duty: runtimes refuse it, they do not wrap."""
    name = op.inputs[1]
    while (maker := s.makers.get(name)) is not None and maker.type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity"):
        name = maker.inputs[0]
    if name in s.inputs:
        s.assumptions.add(f"input {name!r} holds indices into {length} entries")
    else:
        s.problem("index", f"the index lies in {index.low}..{index.high}, the table has {length} entries")


def _reduction_axes(s: Scene, op: Op) -> tuple[Shape, tuple[int, ...]]:
    shape = s.shape(op.inputs[0])
    axes = s.constant(op, 1)
    if axes is None and s.given(op, 1):
        raise Unbounded("its axes are computed")
    return shape, reduced_axes(op, len(shape), None if axes is None else [int(a) for a in axes.reshape(-1)])


def _reduce_sum(s: Scene, op: Op) -> Range:
    shape, axes = _reduction_axes(s, op)
    a = s.of(op, 0).at_rank(len(shape))
    if a.lo.ndim != len(shape):
        a = a.at_rank(len(shape))
    detailed = tuple(i for i in axes if a.lo.ndim == len(shape) and max(a.lo.shape[i], a.hi.shape[i]) > 1)
    a = Range(*(exact(np.broadcast_to(x, np.broadcast_shapes(a.lo.shape, a.hi.shape))) for x in (a.lo, a.hi)))
    if detailed:
        a = Range(*(exact(np.sum(x, axis=detailed, keepdims=True)) for x in (a.lo, a.hi)))
    plain = tuple(shape[i] for i in axes if i not in detailed)
    return _drop(op, interval.times_count(a, *s.counts(op, plain)), axes)


def _extreme(name: str) -> Transfer:
    def transfer(s: Scene, op: Op) -> Range:
        shape, axes = _reduction_axes(s, op)
        a = s.of(op, 0).at_rank(len(shape))
        pick = np.max if name == "max" else np.min
        present = tuple(i for i in axes if i < a.lo.ndim)
        return _drop(op, Range(*(exact(pick(x, axis=present, keepdims=True)) for x in (a.lo, a.hi))), axes)

    return transfer


def _drop(op: Op, a: Range, axes: tuple[int, ...]) -> Range:
    """Without the reduced axes, unless they are kept."""
    if op.attributes.get("keepdims", 1) or not a.lo.ndim:
        return a
    return Range(exact(np.squeeze(a.lo, axes)), exact(np.squeeze(a.hi, axes)))


# ---- sums of products ---------------------------------------------------------------------------------------------


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


TRANSFERS: dict[str, Transfer] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Mod": _modulo,
    "BitShift": _shift,
    "Clip": _clip,
    "Max": _many(interval.most),
    "Min": _many(interval.least),
    "Neg": _negate,
    "Abs": _absolute,
    "Sign": lambda s, op: monotone(np.sign, s.of(op, 0)),
    "Relu": lambda s, op: monotone(lambda x: np.maximum(x, 0), s.of(op, 0)),
    "Where": _where,
    "Cast": _same,
    "Identity": _same,
    "Expand": _same,
    "Transpose": _transpose,
    "Concat": _joined,
    "Pad": _padded,
    "MaxPool": _max_pool,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Gather": _gather,
    "ReduceSum": _reduce_sum,
    "ReduceMax": _extreme("max"),
    "ReduceMin": _extreme("min"),
    "ConvInteger": _conv,
    "MatMulInteger": _matmul_integer,
    "MatMul": _matmul,
    **dict.fromkeys(("Reshape", "Flatten", "Slice", "Split", "Squeeze", "Unsqueeze", "Tile", "DepthToSpace", "Resize"), _mixed),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), _bitwise),
    **dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not"),
        _truth,
    ),
}
