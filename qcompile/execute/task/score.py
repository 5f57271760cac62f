"""A figure of a task for two models, and how sure it is: intervals over samples, never over the entries of one sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Better = Literal["higher", "lower"]
_Z = 1.959964  # two-sided 95 % of a normal distribution
_RESAMPLES, _DRAWS = 1000, 20_000_000
_SHARES = 4  # samples that are added to a share, half of them at each end


@dataclass(frozen=True)
class Score:
    """One figure of both models on `n` samples (pairs, ...).

    `reference`: None where the figure is itself a comparison with the reference.  `low`, `high`: the 95 % interval of
    `difference`, or of `candidate` where there is none; None where it is not known.  `share`: of 1, shown in percent.
    """

    name: str
    reference: float | None
    candidate: float
    n: int
    better: Better = "higher"
    share: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def difference(self) -> float | None:
        """Candidate - reference."""
        return None if self.reference is None else self.candidate - self.reference

    def to_json(self) -> dict[str, Any]:
        """The fields and `difference`."""
        return {**vars(self), "difference": self.difference}


@dataclass
class Means:
    """Sums over the entries of each sample: how many there are, what they come to in the reference (if it has any) and in the
    candidate.  The figure is the mean of an entry."""

    counts: list[F64] = field(default_factory=list[F64])
    reference: list[F64] = field(default_factory=list[F64])
    candidate: list[F64] = field(default_factory=list[F64])

    def add(self, candidate: F64, reference: F64 | None = None, counts: F64 | None = None) -> None:
        """Take samples [n, ...]; `counts` of the same shape says which entries count (0 or 1), default all."""
        kept = np.ones_like(candidate, np.float64) if counts is None else counts
        self.counts.append(_of_samples(kept))
        self.candidate.append(_of_samples(candidate * kept))
        self.reference.append(_of_samples((candidate if reference is None else reference) * kept))

    def columns(self) -> tuple[F64, F64, F64]:
        """Counts, sums of the reference and of the candidate, one each sample."""
        return np.concatenate(self.counts), np.concatenate(self.reference), np.concatenate(self.candidate)

    def score(self, name: str, *, paired: bool, better: Better = "higher", share: bool = False) -> Score:
        """The means; `paired`: of both models, else of the candidate alone."""
        counts, ours, theirs = self.columns()
        total = max(float(counts.sum()), 1.0)
        ends = (-1.0 if paired else 0.0, 1.0) if share else None
        low, high = interval(counts, theirs - ours if paired else theirs, ends)
        before = float(ours.sum()) / total if paired else None
        return Score(name, before, float(theirs.sum()) / total, len(counts), better, share, low, high)


def interval(counts: F64, sums: F64, ends: tuple[float, float] | None = None) -> tuple[float | None, float | None]:
    """The 95 % interval of sum(sums) / sum(counts), a ratio of sums over samples; None of fewer than two samples.

    `ends`: the least and the most that a share can be; samples there are added, half at each, so that 200 right answers of 200
    are no certainty.  Source: Agresti and Coull 1998, Agresti and Min 2005.
    """
    n = len(counts)
    if n < 2 or not counts.sum():
        return None, None
    weights = np.ones(n)
    if ends is not None:
        usual, added = float(counts.mean()), (_SHARES if ends[0] == 0 else _SHARES / 4) / 2
        counts, sums = np.append(counts, [usual, usual]), np.append(sums, np.multiply(ends, usual))
        weights = np.append(weights, [added, added])
    middle = float(weights @ sums) / float(weights @ counts)
    spread = float(weights @ np.square(sums - middle * counts)) * n / (n - 1)
    half = _Z * float(np.sqrt(spread)) / float(weights @ counts)
    low, high = ends or (-np.inf, np.inf)
    return max(low, middle - half), min(high, middle + half)


def resampled(n: int, figure: Callable[[NDArray[np.intp]], float]) -> tuple[float | None, float | None]:
    """The 95 % interval of `figure` of samples drawn again, by their indices (percentile bootstrap, always the same draws)."""
    if n < 2:
        return None, None
    rng = np.random.default_rng(0)
    rounds = max(100, min(_RESAMPLES, _DRAWS // n))
    found = np.array([figure(rng.integers(0, n, n)) for _ in range(rounds)])
    low, high = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else (None, None)


def drawn(
    name: str, columns: Sequence[F64], figure: Callable[..., float], better: Better = "higher", *, paired: bool = True
) -> Score:
    """A score of what is no mean: `figure(*columns, side)` of rows, side 0 is the reference and 1 the candidate."""
    n = len(columns[0])
    ours = figure(*columns, 0) if paired else None

    def again(rows: NDArray[np.intp]) -> float:
        chosen = [c[rows] for c in columns]
        return figure(*chosen, 1) - (figure(*chosen, 0) if paired else 0.0)

    low, high = resampled(n, again)
    return Score(name, ours, figure(*columns, 1), n, better, low=low, high=high)


def ranks(values: F64) -> F64:
    """From 1 on, equal values at the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]


def _of_samples(entries: F64) -> F64:
    return np.asarray(entries, np.float64).reshape(len(entries), -1).sum(1)
