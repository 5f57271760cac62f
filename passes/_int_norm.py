"""LayerNorm and RMSNorm in int64, with an exact integer square root."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import const_array
from qcompile.passes._int_context import Scene
from qcompile.passes._int_emit import BOOL, INT64, UINT64, Emitter, Fixed
from qcompile.passes._int_plan import Step, entry
from qcompile.passes._int_requant import codes, rounded_sum, shift

_FRACTION_BITS = 24
_NEWTON_STEPS = 5
_LARGEST_ROOT = 3037000499
_LARGEST_EPS = 1 << 60
_WIDEST = 1024


def norm(scene: Scene, step: Step) -> Fixed:
    """gamma (x - mean) / sqrt(var + eps) + beta over the last axis, from 16-bit codes x = s q.

    With d = n q - sum(q) and V = sum(d^2):  (x - mean) / sqrt(var + eps) = d sqrt(n) / sqrt(V + eps n^3 / s^2), so the only
    rounding in front of the output's is floor(sqrt) and one division; V stays below 2^62 (wider norms shift d first).
    """
    found, em = step.info, scene.em
    assert found is not None and found.channels is not None
    x = codes(em, step.source, scene.input_format(*entry(step)))
    n, relative = found.channels, found.eps / float(x.scale) ** 2
    d, eps = (em.cast(x.value, INT64), relative * n) if found.kind == "rms" else _centred(em, x, n, relative)
    last = em.const(np.asarray([-1]), INT64)
    energy = em.emit("ReduceSum", [em.emit("Mul", [d, d], INT64), last], INT64, {"keepdims": 1})
    least = int(np.clip(np.rint(eps), 1, _LARGEST_EPS))
    root = square_root(em, em.emit("Add", [energy, em.const(least, INT64)], INT64))
    one = 1 << _FRACTION_BITS
    ratio = em.emit("Div", [em.emit("Mul", [d, em.const(one, INT64)], INT64), root], INT64)
    held = em.emit("Clip", [ratio, em.const(-2 * one, INT64), em.const(2 * one, INT64)], INT64)
    gamma, beta = (None if v is None else const_array(v) for v in (found.gamma, found.beta))
    scale = np.asarray(math.sqrt(n) / one) * (1.0 if gamma is None else gamma.astype(np.float64))
    normal = Fixed(held, scale, -2 * one, 2 * one)
    offset = None if beta is None else beta.astype(np.float64)
    return rounded_sum(em, [normal], offset, scene.stored_format(step.output))


def _centred(em: Emitter, x: Fixed, n: int, eps: float) -> tuple[ir.Value, float]:
    """(n q - sum q, eps n^3), both shifted so that the sum of squares stays below 2^62."""
    wide = em.cast(x.value, INT64)
    total = em.emit("ReduceSum", [wide, em.const(np.asarray([-1]), INT64)], INT64, {"keepdims": 1})
    d = em.emit("Sub", [em.emit("Mul", [wide, em.const(n, INT64)], INT64), total], INT64)
    if n <= _WIDEST:
        return d, eps * float(n) ** 3
    bits = math.ceil(1.5 * math.log2(n / _WIDEST))
    return shift(em, d, np.asarray(bits)), eps * float(n) ** 3 / 4.0**bits


def square_root(em: Emitter, value: ir.Value) -> ir.Value:
    """floor(sqrt(value)) for 1 <= value < 2^63, exact.

    Starts at the power of two just above the root (counted by comparing with powers of four), so that five Newton steps
    converge for every value; one comparison takes the last unit off.  The clips never bind: they carry the proof.  In uint64,
    where ONNX Runtime's Clip is right above 2^31 too.
    """
    powers = em.const(np.asarray([1 << 2 * i for i in range(32)]), INT64)
    reached = em.cast(em.emit("GreaterOrEqual", [value, powers], BOOL), INT64)
    length = em.emit("ReduceSum", [reached, em.const(np.asarray([-1]), INT64)], INT64, {"keepdims": 1})
    x = em.emit("Gather", [em.const(np.asarray([1 << i for i in range(33)]), UINT64), length], UINT64, {"axis": 0})
    square, low, high, two = em.cast(value, UINT64), *(em.const(v, UINT64) for v in (1, _LARGEST_ROOT, 2))
    for _ in range(_NEWTON_STEPS):
        both = em.emit("Add", [x, em.emit("Div", [square, x], UINT64)], UINT64)
        x = em.emit("Clip", [em.emit("Div", [both, two], UINT64), low, high], UINT64)
    above = em.emit("Greater", [em.cast(em.emit("Mul", [x, x], UINT64), INT64), value], BOOL)
    return em.cast(em.emit("Clip", [em.emit("Sub", [x, em.cast(above, UINT64)], UINT64), low, high], UINT64), INT64)
