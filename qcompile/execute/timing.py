"""Latencies that can be compared: the runs of all candidates are interleaved in random order."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.report import Meter

WARM_UP = 5


def interleaved(
    calls: Sequence[Callable[[], object]], runs: int, order: random.Random, progress: Meter | None = None
) -> list[list[float]]:
    """Milliseconds of `runs` calls of each candidate, after 5 untimed ones; a call must return when its work is done."""
    for call in calls:
        for _ in range(WARM_UP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    turns = list(range(len(calls)))
    for i in range(runs):
        order.shuffle(turns)
        for turn in turns:
            start = time.perf_counter()
            calls[turn]()
            times[turn].append(1e3 * (time.perf_counter() - start))
        if progress is not None:
            progress(i + 1, runs)
    return times


@dataclass(frozen=True)
class Timing:
    """One candidate's latency in milliseconds."""

    path: str
    median_ms: float
    min_ms: float

    def to_json(self) -> dict[str, Any]:
        """The keys path, median_ms, min_ms."""
        return dict(vars(self))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the first a candidate is."""

    path: str
    median: float
    min: float

    def to_json(self) -> dict[str, Any]:
        """The keys path, median, min."""
        return dict(vars(self))


def timing(path: object, times: Sequence[float]) -> Timing:
    """Median and minimum of `times`."""
    return Timing(str(path), statistics.median(times), min(times))


def ratios(timings: Sequence[Timing]) -> tuple[Ratio, ...]:
    """Of each to the first."""
    first = timings[0]
    return tuple(Ratio(t.path, first.median_ms / t.median_ms, first.min_ms / t.min_ms) for t in timings)


def made_up(shape: Sequence[int], dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
    """An array for timing: standard normal reals, integers and booleans 0 or 1 (safe as indices and masks)."""
    if dtype.kind in "iub":
        return rng.integers(0, 2, tuple(shape)).astype(dtype)
    return rng.standard_normal(tuple(shape)).astype(np.float32).astype(dtype)
