"""Rotations of a residual stream that its norms allow, and how well each would quantize.

A LayerNorm subtracts the mean over the channels, so R must keep it: x R has the mean of x exactly when R 1 = 1.  With
u = 1/sqrt(C) and an orthogonal F whose first column is u, R = [u | B] S F^T does: B is an orthonormal basis of the rest and
S = diag(1, random signs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.hadamard import block_order, hadamard, klt_rotation, reachable, rotation
from qcompile.quant.qtype import QType
from qcompile.quant.spec import PerAxis

F64 = NDArray[np.float64]
_COLUMNS = 256


def stream_rotation(channels: int, rng: np.random.Generator, keep_mean: bool, second_moment: F64 | None = None) -> F64:
    """R [C, C], orthogonal; with `keep_mean` R 1 = 1.  With the second moment X^T X of the normalised stream its eigenvectors
    come first (KLT, arXiv:2501.13484): every rotated channel then has the same energy."""
    if not keep_mean:
        return rotation(channels, rng) if second_moment is None else klt_rotation(second_moment, rng)
    frame = _frame(channels)
    signs = np.append(1.0, rng.integers(0, 2, channels - 1) * 2.0 - 1.0)
    if second_moment is None:
        return (frame * signs) @ frame.T
    rest = frame[:, 1:]
    inner = rest.T @ second_moment @ rest
    _, vectors = np.linalg.eigh((inner + inner.T) / 2)
    return (np.column_stack([frame[:, 0], rest @ vectors]) * signs) @ frame.T


def _frame(channels: int) -> F64:
    """An orthogonal matrix whose first column is constant: Hadamard, or a cosine basis of blocks where there is none."""
    size = channels if reachable(channels) else block_order(channels)
    h = hadamard(size).astype(np.float64)
    return np.kron(_cosines(channels // size), h * h[:, :1] / np.sqrt(size))


def _cosines(n: int) -> F64:
    """The orthonormal DCT-II basis [n, n], basis vectors as columns, the constant one first."""
    k, i = np.arange(n), np.arange(n)[:, None]
    basis = np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    basis[:, 0] = np.sqrt(1 / n)
    return basis


@dataclass(frozen=True, eq=False)
class Reading:
    """Sampled rows n [k, C] of a normalised stream, and the weight diag(g) W [C, out] that reads them."""

    rows: F64
    weight: F64


def proxy_error(readings: Sequence[Reading], r: F64, types: tuple[QType | None, QType | None]) -> float:
    """Sum over the readers of ||Q(n R) Q(R^T W) - n W||^2 / ||n W||^2; a type of None is not quantized."""
    total = 0.0
    for reading in readings:
        weight = reading.weight[:, :: max(1, reading.weight.shape[1] // _COLUMNS)]
        exact = reading.rows @ weight
        got = _quantized(reading.rows @ r, types[0], None) @ _quantized(r.T @ weight, types[1], 1)
        total += float(np.square(got - exact).sum() / max(np.square(exact).sum(), 1e-30))
    return total


def _quantized(x: F64, qtype: QType | None, axis: int | None) -> F64:
    if qtype is None:
        return x
    top = np.abs(x).max(0 if axis is not None else None)
    params = qparams_from_range(-top, top, qtype, True)
    narrow = x.astype(np.float32)
    fake = fake_quant(narrow, params, qtype) if axis is None else fake_quant(narrow, params, qtype, PerAxis(axis))
    return fake.astype(np.float64)
