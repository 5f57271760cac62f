"""Integer arithmetic that never wraps silently: results are exact, or an Overflow names what would have wrapped.

Everything is numpy integers or bool; intermediate bounds are Python integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Overflow(Exception):
    """A result does not fit its type; the message says which type and how large."""


def require_integers(array: Array) -> Array:
    """`array`, which must be integer or bool.

    Raises:
        TypeError: it holds floats or objects.
    """
    if array.dtype.kind not in "iub":
        raise TypeError(f"the integer oracle met {array.dtype}")
    return array


def extent(array: Array) -> tuple[int, int]:
    """Smallest and largest element as Python integers; (0, 0) when empty."""
    return (int(array.min()), int(array.max())) if array.size else (0, 0)


def fit(array: Array, dtype: np.dtype[Any]) -> Array:
    """`array` (int64) as `dtype`.

    Raises:
        Overflow: an element does not fit.
    """
    low, high = extent(array)
    require_range(low, high, dtype)
    return array.astype(dtype)


def require_range(low: int, high: int, dtype: np.dtype[Any]) -> None:
    """Raises Overflow: [low, high] leaves the range of `dtype`."""
    info = np.iinfo(dtype)
    if low < info.min or high > info.max:
        raise Overflow(f"{dtype} overflow: {low if low < info.min else high} does not fit")


def add(a: Array, b: Array) -> Array:
    """a + b in their type."""
    (a0, a1), (b0, b1) = extent(a), extent(b)
    return _guarded(np.add, a, b, a0 + b0, a1 + b1)


def subtract(a: Array, b: Array) -> Array:
    """a - b in their type."""
    (a0, a1), (b0, b1) = extent(a), extent(b)
    return _guarded(np.subtract, a, b, a0 - b1, a1 - b0)


def multiply(a: Array, b: Array) -> Array:
    """a * b in their type."""
    (a0, a1), (b0, b1) = extent(a), extent(b)
    corners = (a0 * b0, a0 * b1, a1 * b0, a1 * b1)
    return _guarded(np.multiply, a, b, min(corners), max(corners))


def _guarded(function: np.ufunc, a: Array, b: Array, low: int, high: int) -> Array:
    """Native arithmetic where the bounds prove it exact, else element by element with Python integers."""
    info = np.iinfo(a.dtype)
    if info.min <= low and high <= info.max:
        return function(a, b)
    exact = function(a.astype(object), b.astype(object))
    flat = [int(v) for v in np.asarray(exact, object).ravel()]
    require_range(min(flat, default=0), max(flat, default=0), a.dtype)
    return function(a, b)


def divide(a: Array, b: Array) -> Array:
    """a / b truncated toward zero (ONNX Div on integers).

    Raises:
        Overflow: a division by zero, or the smallest number over -1.
    """
    if b.size and not b.all():
        raise Overflow("division by zero")
    info = np.iinfo(a.dtype)
    if info.min < 0 and bool(((a == info.min) & (b == -1)).any()):
        raise Overflow(f"{a.dtype} overflow: {info.min} / -1")
    floor = np.floor_divide(a, b)
    if info.min == 0:
        return floor
    inexact = floor * b != a
    return (floor + (inexact & ((a < 0) != (b < 0)))).astype(a.dtype)


def modulo(a: Array, b: Array, *, truncated: bool) -> Array:
    """ONNX Mod: the sign of the divisor, or with fmod=1 (`truncated`) the sign of the dividend.

    Raises:
        Overflow: a division by zero.
    """
    if b.size and not b.all():
        raise Overflow("division by zero")
    return np.fmod(a, b) if truncated else np.mod(a, b)


def shift(a: Array, bits: Array, *, right: bool) -> Array:
    """Logical shift of unsigned integers.

    Raises:
        Overflow: a shift by the type's width or more (undefined on most machines), or a left shift that loses bits.
    """
    width = a.dtype.itemsize * 8
    if bits.size and int(bits.max()) >= width:
        raise Overflow(f"a shift by {int(bits.max())} of {width} bits")
    if right:
        return np.right_shift(a, bits)
    moved = np.left_shift(a, bits)
    if not np.array_equal(np.right_shift(moved, bits), np.broadcast_to(a, moved.shape)):
        raise Overflow(f"{a.dtype} overflow: a left shift loses bits")
    return moved


def total(a: Array, axes: tuple[int, ...] | None, keepdims: bool) -> Array:
    """Sum over `axes` (None: all) in the type of `a`."""
    low, high = extent(a)
    count = a.size if axes is None else int(np.prod([a.shape[i] for i in axes], dtype=np.int64))
    wide = np.iinfo(np.int64)
    if wide.min <= count * low and count * high <= wide.max:
        return fit(np.asarray(np.sum(a, axis=axes, keepdims=keepdims, dtype=np.int64)), a.dtype)
    exact = np.asarray(np.sum(a.astype(object), axis=axes, keepdims=keepdims))
    flat = [int(v) for v in exact.ravel()]
    require_range(min(flat), max(flat), a.dtype)
    return exact.astype(a.dtype)
