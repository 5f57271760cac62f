"""How each operator maps intervals: the range of its exact result, before it is stored in its type; arithmetic itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompile.oracle import interval
from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range, between, corners, exact, monotone
from qcompile.oracle.scene import Array, Scene, Transfer, Unbounded
from qcompile.oracle.transfer_movement import MOVEMENT, same
from qcompile.oracle.transfer_products import PRODUCTS


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
    pick = _limiting(s, op)
    a, b = s.of(op, 1), s.of(op, 2)
    return interval.join([a, b]) if pick is None else Range(pick(a.lo, b.lo), pick(a.hi, b.hi))


def _limiting(s: Scene, op: Op) -> Callable[[Array, Array], Array] | None:
    """Lemma: where(x < b, b, x) = max(x, b), where(x > b, b, x) = min(x, b)."""
    test = s.makers.get(op.inputs[0])
    if test is None or test.inputs != (op.inputs[2], op.inputs[1]):
        return None
    return interval.most if test.type.startswith("Less") else interval.least if test.type.startswith("Greater") else None


def _truth(_: Scene, __: Op) -> Range:
    return between(0, 1)


TRANSFERS: dict[str, Transfer] = {
    **MOVEMENT,
    **PRODUCTS,
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
    "Cast": same,
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), _bitwise),
    **dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not"),
        _truth,
    ),
}
