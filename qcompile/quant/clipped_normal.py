"""Mean and variance of a normal variable behind ReLU and other clips."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

F64 = NDArray[np.float64]
_PHI_0 = 1 / np.sqrt(2 * np.pi)


def clipped_normal(mean: ArrayLike, std: ArrayLike, low: ArrayLike = -np.inf, high: ArrayLike = np.inf) -> tuple[F64, F64]:
    """(mean, variance) of min(max(x, low), high) for x ~ N(mean, std^2), element by element; bounds may be infinite.

    With a = (low - m) / s and b = (high - m) / s (Nagel et al. 2019, arXiv:1906.04721, appendix C; ReLU: low = 0):
    E[y] = low Phi(a) + m (Phi(b) - Phi(a)) + s (phi(a) - phi(b)) + high (1 - Phi(b)).
    """
    m, s, low, high = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (mean, std, low, high)))
    safe = np.where(s > 0, s, 1.0)
    a, b = (low - m) / safe, (high - m) / safe
    inside, density = ndtr(b) - ndtr(a), _density(a) - _density(b)
    edges = [(_finite(low), ndtr(a)), (_finite(high), ndtr(-b))]
    first = m * inside + safe * density + sum(edge * p for edge, p in edges)
    slopes = (m + _finite(low)) * _density(a) - (m + _finite(high)) * _density(b)
    second = (m**2 + safe**2) * inside + safe * slopes + sum(edge**2 * p for edge, p in edges)
    sharp = np.clip(m, low, high)
    return np.where(s > 0, first, sharp), np.where(s > 0, np.maximum(second - first**2, 0.0), 0.0)


def _density(x: F64) -> F64:
    return _PHI_0 * np.exp(-np.square(x) / 2)


def _finite(x: F64) -> F64:
    """Infinite bounds have no probability: their terms are 0."""
    return np.where(np.isfinite(x), x, 0.0)
