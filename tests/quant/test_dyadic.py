"""Dyadic numbers: ranges, error bounds, ties, and no overflow, against Python's unbounded integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.dyadic import LIMIT, common_dyadic, dyadic, ratio_error, requantize, requantize_error, rounding

INT32 = st.integers(-(2**31) + 1, 2**31 - 1)
RATIOS = st.floats(2.0**-30, 2.0**29, allow_nan=False)


@given(RATIOS)
def test_the_multiplier_has_31_bits_and_is_nearest(ratio: float) -> None:
    m, e = (int(v) for v in dyadic(ratio))
    assert 2**30 <= m < 2**31 and 1 <= e <= 61
    assert abs(Fraction(m, 2**e) - Fraction(ratio)) <= Fraction(float(ratio_error(e)))


@given(st.floats(2.0**-70, 2.0**-31))
def test_tiny_ratios_keep_the_largest_exponent(ratio: float) -> None:
    m, e = (int(v) for v in dyadic(ratio))
    assert e == 61 and 0 <= m < 2**31
    assert abs(Fraction(m, 2**e) - Fraction(ratio)) <= Fraction(1, 2**62)


def test_a_mantissa_that_rounds_up_to_one_is_renormalised() -> None:
    m, e = dyadic(np.nextafter(1.0, 0.0))
    assert (int(m), int(e)) == (2**30, 30)


def test_zero_and_negative_ratios() -> None:
    m, e = dyadic([0.0, -0.5, 0.5])
    assert m.tolist() == [0, -(2**30), 2**30] and e.tolist() == [31, 31, 31]


@pytest.mark.parametrize("ratio", [np.inf, np.nan, 2.0**30, -(2.0**31)])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="finite and below"):
        dyadic(ratio)


@given(INT32, RATIOS)
def test_requantize_is_the_exact_formula(acc: int, ratio: float) -> None:
    m, e = dyadic(ratio)
    exact = (acc * int(m) + 2 ** (int(e) - 1)) // 2 ** int(e)
    assert int(requantize(np.asarray(acc), m, e)) == exact
    assert abs(acc * int(m)) + int(rounding(e)) < 2**63
    assert abs(Fraction(exact) - acc * Fraction(ratio)) <= Fraction(float(requantize_error(abs(acc), e))) + Fraction(1, 2**20)


def test_ties_go_up() -> None:
    m, e = dyadic(0.5)
    assert requantize(np.array([-3, -1, 1, 3]), m, e).tolist() == [-1, 0, 1, 2]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(2.0**-25, 2.0**10), st.integers(1, 2**31 - 1)), min_size=1, max_size=4), st.floats(0, 2.0**26)
)
def test_sums_on_one_exponent_fit_into_62_bits(terms: list[tuple[float, int]], constant: float) -> None:
    ratios, bounds = [r for r, _ in terms], [b for _, b in terms]
    multipliers, e = common_dyadic(ratios, bounds, constant)
    reach = sum(int(m) * b for m, b in zip(multipliers, bounds, strict=True)) + Fraction(constant) * 2 ** int(e)
    assert reach + 2 ** (int(e) - 1) < LIMIT and all(0 <= int(m) < 2**31 for m in multipliers)
    for m, r in zip(multipliers, ratios, strict=True):
        assert abs(Fraction(int(m), 2 ** int(e)) - Fraction(r)) <= Fraction(1, 2 ** (int(e) + 1))


def test_a_sum_that_fits_at_no_exponent_is_refused() -> None:
    with pytest.raises(ValueError, match="62 bits"):
        common_dyadic([2.0**29, 2.0**29], [2**45, 2**45])


def test_against_float_requantization_codes_are_at_most_one_apart() -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**20), 2**20, 200_000)
    ratio = rng.uniform(1e-5, 1e-3, acc.size)
    codes = np.clip(requantize(acc, *dyadic(ratio)), -128, 127)
    rounded = np.clip(np.rint(acc.astype(np.float32) * ratio.astype(np.float32)), -128, 127)
    apart = np.abs(codes - rounded)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
