"""Rounding in integers: sums of fixed-point terms on one exponent, rounded once, half up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.passes.lower.integer.emit import BOOL, INT8, INT32, INT64, UINT64, UNBOUNDED, Emitter, Fixed, Format, Reals
from qcompile.quant.dyadic import common_dyadic, rounding

BIAS = 1 << 62
ANY_INT64 = 2.0**63
_COMPARABLE = 1 << 31


def codes(em: Emitter, value: ir.Value | None, fmt: Format) -> Fixed:
    """The tensor as codes of `fmt`, requantized once for all its readers."""
    assert value is not None
    source = em.read(value)
    if source.follows(fmt):
        return replace(source, value=em.cast(source.value, fmt.dtype))
    if (value, fmt) not in em.codes:
        em.codes[(value, fmt)] = rounded_sum(em, [source], None, fmt)
    return em.codes[(value, fmt)]


def rounded_sum(
    em: Emitter, terms: Sequence[Fixed], constant: Reals | None, fmt: Format, behind: tuple[float, float] = UNBOUNDED
) -> Fixed:
    """codes = clip(floor((sum_i (v_i - z_i) m_i + c 2^e + 2^(e-1)) / 2^e) + zero), with m_i / 2^e = scale_i / scale.

    A single term's clamp becomes the limits of the codes; several terms are clamped first.  `behind` limits the result.

    Raises:
        ModelError: the scales are too far apart for 62 bits.
    """
    clamp = terms[0].clamp if len(terms) == 1 and constant is None else UNBOUNDED
    free = [t if clamp != UNBOUNDED else clamped(em, t) for t in terms]
    offset = None if constant is None else _saturated(constant / fmt.scale, fmt)
    largest = 0.0 if offset is None else float(np.abs(offset).max(initial=0.0))
    ratios = [np.clip(t.scale / fmt.scale, -_far(fmt), _far(fmt)) for t in free]
    try:
        multipliers, e = common_dyadic(ratios, [t.magnitude for t in free], largest)
    except ValueError as error:
        raise ModelError(f"{em.at}: {error}; calibrate on data that reaches the layer, or use --target ort") from error
    reach = _reach(free, ratios, largest)
    total = _total(em, free, multipliers)
    if offset is not None:
        exact = np.rint(np.ldexp(offset, np.broadcast_to(e, np.broadcast_shapes(e.shape, offset.shape)).astype(np.int32)))
        total = em.emit("Add", [total, em.const(_compact(exact.astype(np.int64)), INT64)], INT64)
    return stored(em, shift(em, total, e), fmt, reach, clamp if behind == UNBOUNDED else behind)


def _saturated(offset: Reals, fmt: Format) -> Reals:
    """A mask of -1e4 or -inf need only reach far below the smallest code."""
    far = _far(fmt)
    return np.clip(np.nan_to_num(offset, posinf=far, neginf=-far), -far, far)


def _far(fmt: Format) -> float:
    """So many units saturate whatever they are added to; one unit of a mask input may stand for 3e38."""
    return 2.0 * (abs(fmt.lo) + abs(fmt.hi))


def _total(em: Emitter, terms: Sequence[Fixed], multipliers: Sequence[NDArray[np.int64]]) -> ir.Value:
    total: ir.Value | None = None
    for term, m in zip(terms, multipliers, strict=True):
        wide = em.cast(term.value, INT64)
        if term.zero:
            wide = em.emit("Sub", [wide, em.const(term.zero, INT64)], INT64)
        product = em.emit("Mul", [wide, em.const(_compact(m), INT64)], INT64)
        total = product if total is None else em.emit("Add", [total, product], INT64)
    assert total is not None
    return total


def _reach(terms: Sequence[Fixed], ratios: Sequence[Reals], offset: float) -> float:
    """Bound of the rounded sum."""
    return sum((t.magnitude * float(np.abs(r).max(initial=0.0)) for t, r in zip(terms, ratios, strict=True)), offset) * 1.001 + 2


def shift(em: Emitter, value: ir.Value, e: NDArray[np.int64]) -> ir.Value:
    """floor((value + 2^(e-1)) / 2^e) for |value| < 2^62: an arithmetic shift in unsigned arithmetic (opset 21 has no other)."""
    e = _compact(e)
    rounded = em.emit("Add", [value, em.const(rounding(e), INT64)], INT64)
    biased = em.emit("Add", [rounded, em.const(BIAS, INT64)], INT64)
    shifted = em.emit("BitShift", [em.cast(biased, UINT64), em.const(e, UINT64)], UINT64, {"direction": "RIGHT"})
    return em.emit("Sub", [em.cast(shifted, INT64), em.const(np.right_shift(np.int64(BIAS), e), INT64)], INT64)


def stored(em: Emitter, value: ir.Value, fmt: Format, reach: float, clamp: tuple[float, float] = UNBOUNDED) -> Fixed:
    """Rounded integers around 0, |value| <= reach, as codes of `fmt`: zero point, limits, container."""
    lo, hi = limits(fmt, clamp)
    if fmt.zero:
        value = em.emit("Add", [value, em.const(fmt.zero, INT64)], INT64)
    return Fixed(em.cast(clip(em, value, lo, hi, reach + abs(fmt.zero)), fmt.dtype), np.asarray(fmt.scale), lo, hi, fmt.zero)


def clip(em: Emitter, value: ir.Value, lo: int, hi: int, reach: float) -> ir.Value:
    """Clip of int64 values of magnitude <= reach."""
    if reach < _COMPARABLE:
        return em.emit("Clip", [value, em.const(lo, INT64), em.const(hi, INT64)], INT64)
    return _by_comparison(em, "Min", _by_comparison(em, "Max", value, em.const(lo, INT64)), em.const(hi, INT64))


def _by_comparison(em: Emitter, op: str, value: ir.Value, bound: ir.Value) -> ir.Value:
    """Max or Min of int64 with a constant as Where(value < bound, bound, value).

    ONNX Runtime 1.31's Clip, Max and Min on int64 order numbers wrongly once bit 31 is set in one and not in the other (vector
    code on x86-64, https://github.com/microsoft/onnxruntime/pull/25280); its comparisons are right.
    """
    beyond = em.emit("Less" if op == "Max" else "Greater", [value, bound], BOOL)
    return em.emit("Where", [beyond, bound, value], INT64)


def limits(fmt: Format, clamp: tuple[float, float]) -> tuple[int, int]:
    """The codes that remain when real values are clamped."""
    lo, hi = (fmt.code(c) if math.isfinite(c) else edge for c, edge in zip(clamp, (fmt.lo, fmt.hi), strict=True))
    return int(lo), int(hi)


def clamped(em: Emitter, term: Fixed) -> Fixed:
    """The same tensor with its waiting clamp carried out (Max and Min on the integers)."""
    if term.clamp == UNBOUNDED:
        return term
    wide = max(abs(term.lo), abs(term.hi)) >= _COMPARABLE
    dtype = INT8 if term.value.dtype == INT8 else INT64 if wide else INT32
    value, (low, high) = em.cast(term.value, dtype), term.clamp
    bounds = [_grid(c, term) for c in (low, high)]
    lo, hi = term.lo, term.hi
    for op, bound in zip(("Max", "Min"), bounds, strict=True):
        if bound is not None:
            held, pick = em.const(bound, dtype), max if op == "Max" else min
            value = _by_comparison(em, op, value, held) if wide else em.emit(op, [value, held], dtype)
            lo, hi = pick(lo, int(bound.min())), pick(hi, int(bound.max()))
    return Fixed(value, term.scale, lo, hi, term.zero)


def _grid(bound: float, term: Fixed) -> NDArray[np.int64] | None:
    """A real bound on the integers' grid; None where it lies outside their range."""
    if not math.isfinite(bound):
        return None
    reach = float(max(abs(term.lo), abs(term.hi)) + abs(term.zero))
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.nan_to_num(bound / term.scale, posinf=reach, neginf=-reach)
    codes = np.rint(np.clip(steps, -reach, reach)).astype(np.int64) + term.zero
    return np.clip(codes, -128, 127) if term.value.dtype == INT8 else codes


def _compact(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number where all elements agree."""
    return np.asarray(values.reshape(-1)[0]) if values.size and np.all(values == values.reshape(-1)[0]) else values
