"""Square roots and quotients of computed tensors (pooling by a mask, normalising to unit length)."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT64, UINT64, Emitter, Fixed
from qcompile.passes.lower.integer.norm import square_root
from qcompile.passes.lower.integer.requant import clamped, clip, rounded_sum
from qcompile.target.integer.plan import Step

_ROOM = 60
_QUOTIENT_BITS = 30


def root(scene: Scene, step: Step) -> Fixed:
    """floor(sqrt(v 4^t)): of scale sqrt(s) / 2^t, with t as large as 60 bits allow.

    Raises:
        ModelError: the radicand may be negative.
    """
    em = scene.em
    source = clamped(em, em.read(step.node.inputs[0]))
    if source.lo < 0 or source.zero or not source.is_scalar:
        raise ModelError(f"{step.node.name}: its radicand is not provably positive; use --target ort")
    bits = max((_ROOM - max(source.hi, 1).bit_length()) // 2, 0)
    wide = em.emit("Mul", [em.cast(source.value, INT64), em.const(1 << 2 * bits, INT64)], INT64)
    scale = np.sqrt(source.scale) / 2.0**bits
    return Fixed(square_root(em, _at_least_one(em, wide)), scale, 1, math.isqrt(source.hi << 2 * bits) + 1)


def _at_least_one(em: Emitter, value: ir.Value) -> ir.Value:
    return em.cast(em.emit("Max", [em.cast(value, UINT64), em.const(1, UINT64)], UINT64), INT64)


def divide(scene: Scene, step: Step) -> Fixed:
    """trunc(a 2^f / max(b, 1)), saturated to twice what the output can hold, then rounded into its format.

    Raises:
        ModelError: the divisor may be negative, or varies over channels.
    """
    em, fmt = scene.em, scene.stored_format(step.output)
    a, b = (clamped(em, em.read(v)) for v in step.node.inputs[:2])
    if b.lo < 0 or b.zero or not (a.is_scalar and b.is_scalar):
        raise ModelError(f"{step.node.name}: its divisor is not provably positive; use --target ort")
    largest = 2.0 * max(abs(fmt.lo - fmt.zero), abs(fmt.hi - fmt.zero)) * fmt.scale
    plain = float(a.scale) / float(b.scale)
    bits = int(min(_ROOM + 1 - max(a.magnitude, 1).bit_length(), _QUOTIENT_BITS - math.floor(math.log2(largest / plain))))
    shifted = em.emit("Mul", [_centred(em, a), em.const(1 << max(bits, 0), INT64)], INT64)
    quotient = em.emit("Div", [shifted, _at_least_one(em, b.value)], INT64)
    scale = plain / 2.0 ** max(bits, 0)
    limit = int(largest / scale) + 1
    held = clip(em, quotient, -limit, limit, float(a.magnitude << max(bits, 0)))
    return rounded_sum(em, [Fixed(held, np.asarray(scale), -limit, limit)], None, fmt, scene.clamp_behind(step.output))


def _centred(em: Emitter, term: Fixed) -> ir.Value:
    wide = em.cast(term.value, INT64)
    return em.emit("Sub", [wide, em.const(term.zero, INT64)], INT64) if term.zero else wide
