"""Against sums over a fine grid, and against the published form for ReLU."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from qcompile.quant.clipped_normal import clipped_normal


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 6.0), (-1.0, 1.0), (-np.inf, np.inf), (2.0, 3.0)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-2.0, 0.7), (4.0, 3.0), (1.0, 0.0)])
def test_moments(mean: float, std: float, low: float, high: float) -> None:
    x = np.clip(mean + std * norm.ppf((np.arange(400_000) + 0.5) / 400_000), low, high)
    got = clipped_normal(mean, std, low, high)
    assert np.allclose(got, (x.mean(), x.var()), atol=2e-4 * (1 + std**2))


def test_relu_is_the_published_form() -> None:
    beta, gamma = np.linspace(-3, 3, 13), np.linspace(0.1, 2, 13)
    expected = gamma * norm.pdf(-beta / gamma) + beta * (1 - norm.cdf(-beta / gamma))
    assert np.allclose(clipped_normal(beta, gamma, 0.0)[0], expected, rtol=1e-12)
