"""Companded codes against their definitions, on 1e5 points with 0, 1 and every tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile.quant.companding import (
    GELU_MINIMUM,
    codebook,
    companded_type,
    fit,
    kind_of,
    product_error,
    qparams,
    twin_branches,
    value_error,
)
from qcompile.quant.qtype import COMPANDED, qtype

F64 = NDArray[np.float64]
SOFTMAX = ("log2", "log-sqrt2", "sulq", "adalog", "tan", "twin", "uniform")


def probabilities(rows: int = 64, columns: int = 197, seed: int = 0) -> F64:
    z = np.random.default_rng(seed).standard_normal((rows, columns)) * 3
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def gelu(count: int = 20000) -> F64:
    x = np.random.default_rng(0).standard_normal(count) * 1.5
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def points() -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    spread = np.concatenate([rng.uniform(0, 1, 50_000), 2.0 ** rng.uniform(-20, 0, 49_998), [0.0, 1.0]])
    return spread.astype(np.float32)


@pytest.mark.parametrize("kind", COMPANDED)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("paper", [False, True])
def test_levels(kind: str, bits: int, paper: bool) -> None:
    x = gelu() if kind == "twin-gelu" else probabilities()
    coded = companded_type(kind, bits, paper)
    book = codebook(coded, fit(coded, x))
    allowed = 2**bits + (paper and kind in ("log2", "log-sqrt2", "adalog"))
    assert len(book.thresholds) == len(book.values) - 1 and len(book.values) <= allowed
    assert np.all(np.diff(book.thresholds) >= 0)
    if not (kind == "twin" and paper):
        assert np.all(np.diff(book.values) >= 0), "monotone"
    assert kind_of(coded) == (kind, bits, paper) and qtype(coded.name) == coded


@pytest.mark.parametrize("kind", SOFTMAX)
def test_zero_and_the_top(kind: str) -> None:
    p = probabilities()
    p[0], p[1], p[1, 0] = 1 / p.shape[1], 0.0, 1.0
    coded = companded_type(kind, 4)
    params = fit(coded, p)
    book = codebook(coded, params)
    low, high = book.fake_quant([0.0, 1.0])
    assert abs(low) <= (params.curve[2] if kind == "sulq" else 1e-12)
    assert high >= 0.85


def log_codes(p: NDArray[np.float32], s: float, steps: float, last: int) -> F64:
    """RepQ-ViT's formula, eq. 11-12, in float64; codes past the last stand for 0."""
    with np.errstate(divide="ignore"):
        q = np.maximum(np.rint(-steps * np.log2(p.astype(np.float64) / s)), 0)
    return np.where(q > last, 0.0, s * 2.0 ** (-np.minimum(q, last) / steps))


@pytest.mark.parametrize(("kind", "steps"), [("log2", 1.0), ("log-sqrt2", 2.0)])
@pytest.mark.parametrize("paper", [False, True])
def test_log_codes_are_the_published_formula(kind: str, steps: float, paper: bool) -> None:
    for s in (1.0, 0.37):
        book = codebook(companded_type(kind, 4, paper), qparams(s))
        assert np.array_equal(book.fake_quant(points()), log_codes(points(), s, steps, 15 if paper else 14))


def test_log_sqrt2_by_parity() -> None:
    """s 2^-ceil(q / 2) (1 + odd (sqrt2 - 1)), the form of RepQ-ViT, eq. 13-15."""
    q = np.arange(15)
    parity = 0.37 * 2.0 ** -np.ceil(q / 2) * (1 + (q % 2) * (math.sqrt(2) - 1))
    book = codebook(companded_type("log-sqrt2", 4), qparams(0.37))
    assert np.allclose(np.sort(parity), book.values[1:], rtol=1e-15)


def test_a_tie_takes_the_larger_value() -> None:
    book = codebook(companded_type("log2", 4), qparams(1.0))
    tie = book.thresholds[-1]
    assert tie == np.float32(2**-0.5)
    assert book.fake_quant([tie, np.nextafter(tie, np.float32(0))]).tolist() == [1.0, 0.5]


def test_adalog_multipliers() -> None:
    """q = 37 is log2; the published table rounds 2^(-j / 37) to multiples of 1 / 30, which is up to 0.014 off."""
    x = points()
    base2, log2 = (
        codebook(companded_type("adalog", 4), qparams(1.0, 37, 0.0, 0.0)),
        codebook(companded_type("log2", 4), qparams(1.0)),
    )
    assert np.array_equal(base2.fake_quant(x), log2.fake_quant(x))
    exact = codebook(companded_type("adalog", 4), qparams(1.0, 18, 0.0, 0.0))
    assert np.allclose(exact.values[1:], 2.0 ** (-np.arange(14, -1, -1) * 18 / 37), rtol=1e-15)
    paper = codebook(companded_type("adalog", 4, paper=True), qparams(1.0, 18, 0.0, 0.0))
    error = np.abs(paper.values[1:] - 2.0 ** (-np.arange(15, -1, -1) * 18 / 37))
    assert 0.01 < error.max() < 0.017 and len(paper.values) == 17


def test_adalog_of_gelu_is_log_of_the_shifted_values() -> None:
    x, d = gelu().astype(np.float32), GELU_MINIMUM
    book = codebook(companded_type("adalog", 4), qparams(3.0, 20, d, d))
    plain = codebook(companded_type("adalog", 4), qparams(3.0, 20, 0.0, 0.0))
    shifted = plain.fake_quant(x.astype(np.float64) + d) - d
    differs = book.fake_quant(x) != shifted
    assert differs.mean() < 1e-3, "x + d is rounded to float32 in one of them: only ties move"
    assert fit(companded_type("adalog", 4), x, shift=d).curve[1:] == (d, d)


def test_sulq_merges_levels_in_the_published_form() -> None:
    params = qparams(1.0, math.log2(0.01), math.log2(1.01), 0.01)
    honest, paper = (codebook(companded_type("sulq", 4, p), params) for p in (False, True))
    assert len(np.unique(honest.values)) == 16 and len(np.unique(paper.values)) == 8
    step = (params.curve[1] - params.curve[0]) / 15
    codes = np.clip(np.rint((np.log2(points().astype(np.float64) + 0.01) - params.curve[0]) / step), 0, 15)
    formula = 2.0 ** (codes * step + params.curve[0]) - 0.01
    assert np.mean(np.abs(honest.fake_quant(points()) - formula) > 1e-12) < 1e-4, "ties only"


def test_tan_is_fine_at_both_ends() -> None:
    values = codebook(companded_type("tan", 4), qparams(1.0, 2.9)).values
    gaps = np.diff(values)
    assert values[0] == pytest.approx(0, abs=1e-15) and values[-1] == pytest.approx(1)
    assert gaps[0] < gaps[7] / 3 and gaps[-1] < gaps[7] / 3


def two_branches(x: NDArray[np.float32], low: tuple[float, int], high: tuple[float, int], split: float) -> NDArray[np.float32]:
    """The definition: QuantizeLinear of each part, in float32; the split belongs to the upper one."""
    small = np.where(x < np.float32(split), x, np.float32(0))
    parts = ((small, *low), (x - small, *high))
    return sum((np.clip(np.rint(v / np.float32(d)), 0, n) * np.float32(d) for v, d, n in parts), np.zeros_like(x))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("m", [0, 1, 3, 7, 12])
def test_twin_is_the_sum_of_its_branches(bits: int, m: int) -> None:
    """Bit for bit where the steps are powers of two (paper form); ties at k + 1/2 go to even k in both."""
    low, high, split = twin_branches(1.0, m, bits, True)
    ties = np.concatenate([(np.arange(high[1]) + 0.5) * d for d, _ in (low, high)])
    x = np.concatenate([points(), [np.float32(split)], ties]).astype(np.float32)
    book = codebook(companded_type("twin", bits, True), qparams(1.0, m))
    assert np.array_equal(book.fake_quant(x).astype(np.float32), two_branches(x, low, high, split))


@pytest.mark.parametrize("m", [0, 2, 5, 11])
def test_honest_twin(m: int) -> None:
    low, high, split = twin_branches(0.8, m, 4, False)
    book = codebook(companded_type("twin", 4), qparams(0.8, m))
    differs = np.abs(book.fake_quant(points()) - two_branches(points(), low, high, split)) > 1e-6
    assert differs.mean() < 1e-4 and book.fake_quant([0.8])[0] == pytest.approx(0.8)


def test_twin_of_gelu() -> None:
    x, neg, pos = gelu().astype(np.float32), np.float32(2.0**-6), np.float32(2.0**-2)
    book = codebook(companded_type("twin-gelu", 4), qparams(float(pos), float(neg)))
    below = np.clip(np.rint(np.minimum(x, 0) / neg), -8, 0) * neg
    above = np.clip(np.rint(np.maximum(x, 0) / pos), 0, 7) * pos
    assert np.array_equal(book.fake_quant(x).astype(np.float32), below + above) and len(book.values) == 16


def test_four_bits_of_powers_of_two_are_e4m3_numbers() -> None:
    import ml_dtypes

    book = codebook(companded_type("log2", 4, True), qparams(1.0))
    scaled = (book.values * 2.0**8).astype(np.float32)
    assert np.array_equal(scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), scaled)


@pytest.mark.parametrize("kind", SOFTMAX)
def test_the_search_is_not_worse_than_the_default(kind: str) -> None:
    p, coded = probabilities(), companded_type(kind, 4)
    error = product_error(1.0, 0.3)

    def loss(s: float, *curve: float) -> float:
        return error(codebook(coded, qparams(s, *curve)).fake_quant(p) - p)

    curves = {"adalog": (37, 0.0, 0.0), "sulq": (math.log2(p.min() + 0.01), math.log2(p.max() + 0.01), 0.01), "twin": (3,)}
    curve = curves.get(kind, (math.pi * 0.875,) if kind == "tan" else ())
    best = fit(coded, p, error)
    assert loss(float(best.scale), *best.curve) <= loss(float(p.max()), *curve) * (1 + 1e-12)


def test_more_bits_tend_to_float() -> None:
    p = probabilities()
    for kind in ("sulq", "tan", "twin", "uniform", "adalog"):
        errors = [value_error(codebook(c, fit(c, p)).fake_quant(p) - p) for c in (companded_type(kind, b) for b in (4, 8))]
        assert errors[1] < errors[0] / 50, kind


def test_product_error_is_that_of_the_product() -> None:
    rng = np.random.default_rng(0)
    mean, e = rng.standard_normal(8), rng.standard_normal((4, 50)) * 0.01
    errors = [np.square(e @ (mean + rng.standard_normal((50, 8)) * 0.5)).sum(1).mean() for _ in range(2000)]
    assert product_error(8 * 0.25, float(mean @ mean))(e) == pytest.approx(np.mean(errors), rel=0.05)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(COMPANDED), st.integers(2, 8), st.integers(0, 10_000))
def test_quantizing_twice_changes_nothing(kind: str, bits: int, seed: int) -> None:
    x = gelu(500) if kind == "twin-gelu" else probabilities(4, 30, seed)
    coded = companded_type(kind, bits)
    book = codebook(coded, fit(coded, x))
    once = book.fake_quant(x)
    assert np.array_equal(book.fake_quant(once), once)


def test_unknown_types() -> None:
    for name in ("logu4", "log2", "log2ux", "twinu4@int8"):
        with pytest.raises(ValueError, match="unknown"):
            qtype(name)
