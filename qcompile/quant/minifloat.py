"""Small floating-point formats.

    E4M3 (no infinity)   bias 7, steps of 2^-9 below 2^-6, largest 448
    E2M1                 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    E8M0                 2^(code - 127), no sign, no zero

Rounding is half to even and saturates.  The graphs of `qcompile.execute.emulate` equal these functions bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

F32 = NDArray[np.float32]
E8M0_BIAS = 127


@dataclass(frozen=True)
class MiniFloat:
    """Sign, `exponent_bits`, `mantissa_bits`; value (1 + m / 2^M) 2^(e - bias), subnormal at e = 0; at most `largest`."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float


E4M3 = MiniFloat(4, 3, 7, 448.0)
E2M1 = MiniFloat(2, 1, 1, 6.0)


def decode(codes: ArrayLike, form: MiniFloat) -> F32:
    """Values of bit patterns (sign, exponent, mantissa from the highest bit); patterns above `largest` are NaN."""
    bits = np.asarray(codes, np.int64)
    mantissa = bits & ((1 << form.mantissa_bits) - 1)
    exponent = (bits >> form.mantissa_bits) & ((1 << form.exponent_bits) - 1)
    sign = np.where(bits >> (form.exponent_bits + form.mantissa_bits) & 1, -1.0, 1.0)
    fraction = mantissa / (1 << form.mantissa_bits) + (exponent > 0)
    value = np.ldexp(fraction, np.maximum(exponent, 1) - form.bias)
    return (sign * np.where(value > form.largest, np.nan, value)).astype(np.float32)


def round_minifloat(x: ArrayLike, form: MiniFloat) -> F32:
    """The nearest value of `form`, half to even, saturating at +-largest; the sign of zero and NaN are kept.

    step = 2^(max(floor(log2 |x|) + bias, 1) - M - bias), Q = step rint(x / step)   (LLM-FP4, arXiv:2310.16836, eq. 4)
    """
    wide = np.asarray(x, np.float64)
    magnitude = np.minimum(np.abs(wide), form.largest)
    _, exponent = np.frexp(magnitude)
    step = np.ldexp(1.0, np.maximum(exponent - 1, 1 - form.bias) - form.mantissa_bits)
    return np.copysign(np.minimum(np.rint(magnitude / step) * step, form.largest), wide).astype(np.float32)


def e8m0_exponents(amax: ArrayLike) -> NDArray[np.uint8]:
    """Codes of the smallest powers of two with amax <= 448 * 2^(code - 127): ceil(log2(amax / 448)) + 127, exact; 0 for 0."""
    fraction, exponent = np.frexp(np.asarray(amax, np.float64) / E4M3.largest)
    return np.where(fraction > 0, np.clip(exponent - (fraction == 0.5) + E8M0_BIAS, 0, 254), 0).astype(np.uint8)


def e8m0_values(codes: ArrayLike) -> F32:
    """2^(code - 127)."""
    return np.ldexp(np.float64(1), np.asarray(codes, np.int64) - E8M0_BIAS).astype(np.float32)
