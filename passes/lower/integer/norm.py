"""LayerNorm, RMSNorm and GroupNorm in int64, with an exact integer square root."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import const_array
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import BOOL, INT64, UINT64, Emitter, Fixed
from qcompile.passes.lower.integer.requant import clip, codes, rounded_sum, shift
from qcompile.target.integer.groups import Groups, groups_of
from qcompile.target.integer.plan import Step, entry

_ONE = 1 << 24
_NEWTON_STEPS = 5
_LARGEST_ROOT = 3037000499
_LARGEST_EPS = 1 << 60
_EXACT_SUM = 1 << 53


def norm(scene: Scene, step: Step) -> Fixed:
    """gamma (x - mean) / sqrt(var + eps) + beta over the last axis or over groups of channels, from 16-bit codes x = s q.

    With d = n q - sum(q) and V = sum(d^2):  (x - mean) / sqrt(var + eps) = d sqrt(n) / sqrt(V + eps n^3 / s^2), so the only
    rounding in front of the output's is floor(sqrt) and one division.  V stays within 2^53 (wider norms shift d first):
    ONNX Runtime sums int64 in double.
    """
    found, em = step.info, scene.em
    assert found is not None
    x = codes(em, step.source, scene.input_format(*entry(step)))
    gamma, beta = (None if v is None else np.asarray(const_array(v), np.float64) for v in (found.gamma, found.beta))
    if found.kind == "group":
        groups = groups_of(found)
        assert isinstance(groups, Groups)
        n, held = groups.size, _over_groups(em, x, groups, found.eps)
        gamma, beta = (None if v is None else groups.along_channels(v) for v in (gamma, beta))
    else:
        assert found.channels is not None
        n, held = found.channels, _normalised(em, x, found.channels, found.eps, centre=found.kind == "layer")
    scale = np.asarray(math.sqrt(n) / _ONE) * (1.0 if gamma is None else gamma)
    return rounded_sum(em, [Fixed(held, scale, -2 * _ONE, 2 * _ONE)], beta, scene.stored_format(step.output))


def _over_groups(em: Emitter, x: Fixed, groups: Groups, eps: float) -> ir.Value:
    """[N, C, ...] normalised as [N, groups, elements of a group]."""
    inside = replace(x, value=_reshaped(em, x.value, groups.count, groups.size))
    return _reshaped(em, _normalised(em, inside, groups.size, eps, centre=True), *groups.shape)


def _reshaped(em: Emitter, value: ir.Value, *shape: int) -> ir.Value:
    """[N, ...] as [N, *shape]."""
    assert value.dtype is not None
    return em.emit("Reshape", [value, em.const(np.asarray([0, *shape]), INT64)], value.dtype)


def _normalised(em: Emitter, x: Fixed, n: int, eps: float, *, centre: bool) -> ir.Value:
    """(x - mean) / (sqrt(var + eps) sqrt(n)) over the last axis, in 2^-24."""
    d, reach, factor = _centred(em, x, n) if centre else (em.cast(x.value, INT64), x.magnitude, float(n))
    bits = _spare_bits(n, reach)
    if bits:
        d, reach = shift(em, d, np.asarray(bits)), _shifted(reach, bits)
    least = eps / float(x.scale) ** 2 * factor / 4.0**bits
    return _over_length(em, d, int(np.clip(np.rint(least), 1, _LARGEST_EPS)), reach)


def _centred(em: Emitter, x: Fixed, n: int) -> tuple[ir.Value, int, float]:
    """n q - sum q, its bound, and the factor n^3 that epsilon takes."""
    wide = em.cast(x.value, INT64)
    total = em.emit("ReduceSum", [wide, em.const(np.asarray([-1]), INT64)], INT64, {"keepdims": 1})
    d = em.emit("Sub", [em.emit("Mul", [wide, em.const(n, INT64)], INT64), total], INT64)
    return d, n * (x.hi - x.lo), float(n) ** 3


def _spare_bits(n: int, reach: int) -> int:
    """By how many bits n numbers of magnitude `reach` are shifted for their squares to add up to 2^53 at most."""
    return next(bits for bits in range(64) if n * _shifted(reach, bits) ** 2 <= _EXACT_SUM)


def _shifted(reach: int, bits: int) -> int:
    return reach if not bits else (reach + (1 << (bits - 1))) >> bits


def _over_length(em: Emitter, d: ir.Value, least: int, reach: int) -> ir.Value:
    """trunc(d 2^24 / floor(sqrt(sum(d^2) + least))) over the last axis; the clip never binds, it carries the proof."""
    energy = em.emit("ReduceSum", [em.emit("Mul", [d, d], INT64), em.const(np.asarray([-1]), INT64)], INT64, {"keepdims": 1})
    root = square_root(em, em.emit("Add", [energy, em.const(least, INT64)], INT64))
    ratio = em.emit("Div", [em.emit("Mul", [d, em.const(_ONE, INT64)], INT64), root], INT64)
    return clip(em, ratio, -2 * _ONE, 2 * _ONE, float(reach * _ONE))


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
