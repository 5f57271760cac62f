"""Logarithmic codes for softmax outputs: P ~ s * base^(-q), with base 2 or sqrt 2."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.quant.qtype import QType, qtype

F64 = NDArray[np.float64]
STEPS = {"log2": 1.0, "log-sqrt2": 2.0}
_QUANTILES = (0.999, 0.9999, 0.99999, 1.0)


def log_type(kind: str, bits: int, paper: bool = False) -> QType:
    """The code type: `kind` is log2 or log-sqrt2.

    Codes 0 .. last stand for s * 2^(-code / steps); `last + 1` stands for zero.  Honest types spend one of the 2^bits codes on
    zero, the paper's (RepQ-ViT, arXiv:2212.08254, eq. 12) have an extra one.
    """
    return qtype(f"{kind}u{bits}{'p' if paper else ''}")


def log_quantize(p: ArrayLike, scale: float, coded: QType) -> NDArray[np.int64]:
    """Codes of p >= 0: rint(-steps * log2(p / scale)), clipped to [0, qmax]; qmax means zero."""
    with np.errstate(divide="ignore"):
        exponent = -steps(coded) * np.log2(np.asarray(p, np.float64) / scale)
    return np.clip(np.rint(exponent), 0, coded.qmax).astype(np.int64)


def log_table(scale: float, coded: QType) -> F64:
    """The value of every code, [qmax + 1]; the last is 0."""
    codes = np.arange(int(coded.qmax) + 1, dtype=np.float64)
    table = scale * 2.0 ** (-codes / steps(coded))
    table[-1] = 0.0
    return table


def steps(coded: QType) -> float:
    """Codes an octave: 1 for log2, 2 for log-sqrt2."""
    return STEPS[coded.name.partition("u")[0]]


def best_log_scale(p: ArrayLike, coded: QType) -> float:
    """The quantile of p (99.9, 99.99, 99.999 %, or its maximum) with the least mean squared error."""
    x = np.asarray(p, np.float64).ravel()
    candidates = [float(q) for q in np.quantile(x, _QUANTILES) if q > 0] or [1.0]
    return min(candidates, key=lambda s: float(np.square(log_table(s, coded)[log_quantize(x, s, coded)] - x).mean()))
