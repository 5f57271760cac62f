"""Dyadic against float requantization: never more than one code apart, and how often."""

from __future__ import annotations

import numpy as np

from qcompile.quant.dyadic import dyadic, requantize

DRAWS, MOST_APART = 1_000_000, 1e-5


def codes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(dyadic, float32 as ONNX Runtime's QLinearConv) codes of random accumulators under random ratios of scales."""
    rng = np.random.default_rng(seed)
    ratio = np.exp2(rng.uniform(-14, 2, DRAWS))
    acc = np.rint(rng.uniform(-140, 140, DRAWS) / ratio).astype(np.int64)
    whole = np.clip(requantize(acc, *dyadic(ratio)), -128, 127)
    real = np.rint(acc.astype(np.float32) * ratio.astype(np.float32))
    return whole, np.clip(real, -128, 127).astype(np.int64)


def test_dyadic_codes_are_within_one_of_float_codes() -> None:
    whole, real = codes()
    assert np.abs(whole - real).max() <= 1


def test_they_differ_on_ties_and_on_float32s_own_rounding_only() -> None:
    """Off ties: on fewer than 1 in 100,000 draws (the reals' ratio has 24 bits in float32, 31 here)."""
    whole, real = codes(1)
    rng = np.random.default_rng(1)
    ratio = np.exp2(rng.uniform(-14, 2, DRAWS))
    acc = np.rint(rng.uniform(-140, 140, DRAWS) / ratio)
    tie = np.abs(np.abs(acc * ratio - np.trunc(acc * ratio)) - 0.5) < 1e-5
    assert np.mean((whole != real) & ~tie) < MOST_APART
    assert np.mean(whole != real) < 2 * MOST_APART
