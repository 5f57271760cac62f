"""Dyadic numbers m / 2^e: how integer hardware multiplies by a real ratio of scales.

    requantize(acc) = floor((acc * m + 2^(e-1)) / 2^e)        m / 2^e ~ s_in / s_out,  2^30 <= |m| < 2^31

(HAWQ-V3, Yao et al. 2021, arXiv:2011.10680, section 3.2; the multiplier of 31 bits follows gemmlowp.)  One rounding, ties
toward plus infinity ("half up").  Everything that happens at run time is int64: |acc| < 2^31 keeps acc * m below 2^62.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

MULTIPLIER_BITS = 31
MAX_SHIFT = 61
LIMIT = 1 << 62
_LARGEST_RATIO = float(1 << 30)


def dyadic(ratio: ArrayLike) -> tuple[Ints, Ints]:
    """(m, e), both of the shape of `ratio`, with m / 2^e nearest to it: 2^30 <= |m| < 2^31 and 1 <= e <= 61.

    A ratio of 0 gives m = 0; one below 2^-31 keeps e = 61 and loses bits of m.  |m / 2^e - ratio| <= `ratio_error(e)`.

    Raises:
        ValueError: a ratio is not finite, or 2^30 or above.
    """
    return _rounded(_finite(ratio), _exponent(np.abs(_finite(ratio))))


def common_dyadic(ratios: Sequence[ArrayLike], bounds: Sequence[int], constant: float = 0.0) -> tuple[list[Ints], Ints]:
    """Multipliers of several terms on one exponent, so that their sum is rounded once: ([m_1, ...], e).

    `bounds[i]` limits the magnitude of term i's integers and `constant` that of what is added in output units; the exponent
    is the largest with sum_i |m_i| bounds[i] + constant 2^e + 2^(e-1) < 2^62, elementwise over the broadcast shape.

    Raises:
        ValueError: a ratio is not finite or 2^30 or above, or no exponent is small enough.
    """
    arrays = np.broadcast_arrays(*[_finite(r) for r in ratios])
    largest = np.max(np.abs(np.stack(arrays)), axis=0)
    total = sum((np.abs(a) * float(b) for a, b in zip(arrays, bounds, strict=True)), np.zeros(largest.shape))
    room = np.floor(np.log2(LIMIT * 0.999) - np.log2(total + constant + 0.5 + 1e-300))
    e = np.minimum(_exponent(largest), room.astype(np.int64))
    if np.any(e < 1):
        raise ValueError("the sum of the terms does not fit into 62 bits at any exponent")
    return [_rounded(_finite(r), e)[0] for r in ratios], e


def requantize(acc: NDArray[Any], m: ArrayLike, e: ArrayLike) -> Ints:
    """floor((acc * m + 2^(e-1)) / 2^e) in int64: rounding half up.  `acc` |.| < 2^31; m and e broadcast against it."""
    product = acc.astype(np.int64) * np.asarray(m, np.int64)
    return np.asarray((product + rounding(e)) >> np.asarray(e, np.int64))


def rounding(e: ArrayLike) -> Ints:
    """2^(e-1), what is added before the shift."""
    return np.asarray(np.left_shift(np.int64(1), np.asarray(e, np.int64) - 1))


def ratio_error(e: ArrayLike) -> NDArray[np.float64]:
    """The bound 2^-(e+1) of |m / 2^e - ratio|."""
    return np.asarray(np.exp2(-(np.asarray(e, np.float64) + 1)))


def requantize_error(bound: float, e: ArrayLike) -> NDArray[np.float64]:
    """How far requantize(acc) is from acc * ratio at most, for |acc| <= bound: half a unit of rounding + bound 2^-(e+1)."""
    return np.asarray(0.5 + bound * ratio_error(e))


def _finite(ratio: ArrayLike) -> NDArray[np.float64]:
    r = np.asarray(ratio, np.float64)
    if not np.isfinite(r).all() or np.any(np.abs(r) >= _LARGEST_RATIO):
        raise ValueError("a ratio of scales must be finite and below 2^30")
    return r


def _exponent(magnitude: NDArray[np.float64]) -> Ints:
    """e with magnitude * 2^e in [2^30, 2^31), within [1, 61]; 31 where the magnitude is 0."""
    _, power = np.frexp(magnitude)
    e = np.where(magnitude > 0, MULTIPLIER_BITS - power.astype(np.int64), MULTIPLIER_BITS)
    renormal = np.rint(np.ldexp(magnitude, np.minimum(e, MAX_SHIFT).astype(np.int32))) >= 2.0**MULTIPLIER_BITS
    return np.clip(e - renormal, 1, MAX_SHIFT).astype(np.int64)


def _rounded(ratio: NDArray[np.float64], e: Ints) -> tuple[Ints, Ints]:
    """m = floor(ratio * 2^e + 1/2)."""
    return np.floor(np.ldexp(ratio, e.astype(np.int32)) + 0.5).astype(np.int64), e
