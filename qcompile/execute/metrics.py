"""How far a candidate's outputs are from a reference's, and how good they are against labels.

Everything is a sum over batches: tallies take batch after batch, so memory does not grow with the data.
Arrays are [N, ...]; logits are [..., C] with the classes on the last axis.  Arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
MAX_SQNR_DB = 200.0
_PROBABILITY_TOLERANCE = 1e-3


@dataclass
class Distance:
    """Sums that give SQNR, cosine and the largest relative error of two equally shaped streams."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    dot: float = 0.0
    largest_error: float = 0.0
    largest: float = 0.0
    entries: int = 0

    def add(self, reference: ArrayLike, candidate: ArrayLike) -> None:
        """Take a batch of both; any shape, the same for both.

        Raises:
            ValueError: the shapes differ.
        """
        r, c = _pair(reference, candidate)
        difference = c - r
        self.entries += r.size
        self.signal += float(r @ r)
        self.noise += float(difference @ difference)
        self.power += float(c @ c)
        self.dot += float(r @ c)
        self.largest_error = float(np.maximum(self.largest_error, np.abs(difference).max(initial=0.0)))
        self.largest = float(np.maximum(self.largest, np.abs(r).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float:
        """10 log10(sum r^2 / sum (c - r)^2) in dB, within +-200; 200 when nothing differs."""
        return decibel(self.signal, self.noise)

    @property
    def rms_error(self) -> float:
        """The root of the mean of (c - r)^2."""
        return float(np.sqrt(self.noise / max(self.entries, 1)))

    @property
    def cosine(self) -> float:
        """r.c / (|r| |c|); 1 when both are zero, 0 when one is."""
        norm = float(np.sqrt(self.signal) * np.sqrt(self.power))
        return self.dot / norm if norm else float(self.signal == self.power)

    @property
    def relative_error(self) -> float:
        """max |c - r| / max |r|; the absolute error when the reference is zero."""
        return self.largest_error / self.largest if self.largest else self.largest_error


@dataclass
class LogitTally:
    """Agreement and KL divergence of two streams of logits [..., C]."""

    rows: int = 0
    agreeing: int = 0
    kl_sum: float = 0.0

    def add(self, reference: ArrayLike, candidate: ArrayLike) -> None:
        """Take a batch of both."""
        r, c = _rows(reference), _rows(candidate)
        log_p, log_q = log_probabilities(r), log_probabilities(c)
        self.rows += len(r)
        self.agreeing += int((r.argmax(-1) == c.argmax(-1)).sum())
        self.kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum())

    @property
    def agreement(self) -> float:
        """Share of rows whose largest entry is the same class, in [0, 1]."""
        return self.agreeing / max(self.rows, 1)

    @property
    def kl(self) -> float:
        """Mean KL(reference || candidate) of a row, in nats."""
        return max(self.kl_sum / max(self.rows, 1), 0.0)


def sqnr_db(reference: ArrayLike, candidate: ArrayLike) -> float:
    """Signal to quantization noise ratio in dB (see `Distance.sqnr_db`)."""
    return _distance(reference, candidate).sqnr_db


def cosine(reference: ArrayLike, candidate: ArrayLike) -> float:
    """Cosine of the angle between the flattened arrays."""
    return _distance(reference, candidate).cosine


def relative_error(reference: ArrayLike, candidate: ArrayLike) -> float:
    """max |candidate - reference| / max |reference|."""
    return _distance(reference, candidate).relative_error


def kl(reference: ArrayLike, candidate: ArrayLike) -> float:
    """Mean KL(reference || candidate) over the rows of two arrays of logits [..., C], in nats."""
    return _logits(reference, candidate).kl


def agreement(reference: ArrayLike, candidate: ArrayLike) -> float:
    """Share of rows of two arrays of logits [..., C] with the same largest class."""
    return _logits(reference, candidate).agreement


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise) within +-`MAX_SQNR_DB`."""
    if noise == 0.0:
        return MAX_SQNR_DB
    if signal == 0.0:
        return -MAX_SQNR_DB
    return float(np.clip(10.0 * (np.log10(signal) - np.log10(noise)), -MAX_SQNR_DB, MAX_SQNR_DB))


def log_probabilities(rows: Array) -> Array:
    """Logarithms of the class probabilities of rows [R, C]: a log-softmax, or a plain log of rows that are probabilities."""
    if _are_probabilities(rows):
        return np.log(np.maximum(rows, np.finfo(np.float64).tiny))
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _are_probabilities(rows: Array) -> bool:
    return bool(rows.size and rows.min() >= 0.0 and np.allclose(rows.sum(-1), 1.0, atol=_PROBABILITY_TOLERANCE))


def _rows(logits: ArrayLike) -> Array:
    z = np.asarray(logits).astype(np.float64)
    return z.reshape(-1, z.shape[-1])


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        raise ValueError(f"arrays of shapes {x.shape} and {y.shape} cannot be compared")
    return x.reshape(-1).astype(np.float64), y.reshape(-1).astype(np.float64)


def _distance(reference: ArrayLike, candidate: ArrayLike) -> Distance:
    distance = Distance()
    distance.add(reference, candidate)
    return distance


def _logits(reference: ArrayLike, candidate: ArrayLike) -> LogitTally:
    tally = LogitTally()
    tally.add(reference, candidate)
    return tally


class ChannelTally:
    """Per-channel sums of two streams, to tell a rescaled tensor (a folded affine map) from a noisy one.

    The channel axis is 1 for 4-D tensors (NCHW) and the last one otherwise.
    """

    def __init__(self) -> None:
        self._sums: Array | None = None

    def add(self, reference: ArrayLike, candidate: ArrayLike) -> None:
        """Take a batch of both; tensors of fewer than two axes count as one channel."""
        r, c = _by_channel(reference), _by_channel(candidate)
        ones = np.full(r.shape[1], float(r.shape[0]))
        sums = np.stack([ones, r.sum(0), c.sum(0), (r * r).sum(0), (c * c).sum(0), (r * c).sum(0)])
        if self._sums is not None and self._sums.shape == sums.shape:
            sums = self._sums + sums
        self._sums = sums

    def fit(self) -> tuple[float, float]:
        """SQNR in dB after undoing the best map c = a r + b of each channel, and the median of |a - 1|."""
        if self._sums is None:
            return MAX_SQNR_DB, 0.0
        n, r, c, rr, cc, rc = self._sums
        spread, cross = rr - r * r / n, rc - r * c / n
        live = spread > 1e-12 * max(float(rr.max()), 1e-300)
        slope = np.divide(cross, spread, out=np.ones_like(spread), where=live)
        lost = live & (np.abs(slope) <= 1e-9)
        live &= ~lost
        rest = np.maximum(cc - c * c / n - slope * cross, 0.0)
        noise = np.divide(rest, slope * slope, out=np.zeros_like(rest), where=live)
        signal, gone = float(rr[live | lost].sum()), float(rr[lost].sum())
        return decibel(signal, float(noise.sum()) + gone), float(np.median(np.abs(slope - 1.0)))


def _by_channel(array: ArrayLike) -> Array:
    """[positions, channels]."""
    a = np.asarray(array).astype(np.float64)
    if a.ndim < 2:
        return a.reshape(-1, 1)
    moved = np.moveaxis(a, 1 if a.ndim == 4 else -1, -1)
    return moved.reshape(-1, moved.shape[-1])
