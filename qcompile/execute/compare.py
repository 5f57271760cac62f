"""Whether two models compute the same: their outputs on a few samples, on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.metrics import decibel
from qcompile.execute.opening import open_model, run_in_parts
from qcompile.execute.session import SAMPLES, run
from qcompile.ir.cut import BLOCK_NODES
from qcompile.ir.mapped import let_go
from qcompile.ir.model import Model
from qcompile.ir.spill import is_large
from qcompile.report import Comparison

PART_BYTES = 1 << 26


@dataclass
class OrtComparator:
    """Runs models on a few calibration samples plus one random one, optimizations off, Q/DQ simulated exactly."""

    feeds: list[dict[str, NDArray[Any]]]
    threads: int | None = None

    def outputs(self, model: Model) -> list[list[NDArray[Any]]]:
        """All outputs for every feed."""
        if is_large(model.graph) or len(model.graph) > 2 * BLOCK_NODES:
            return run_in_parts(runnable(model), self.feeds, PART_BYTES, threads=self.threads)
        session = open_model(model, exact=True, threads=self.threads)
        found = [run(session, {k: v for k, v in feed.items() if k != SAMPLES}, None, i) for i, feed in enumerate(self.feeds)]
        let_go(model.ir)
        return found

    def compare(self, reference: list[list[NDArray[Any]]], candidate: list[list[NDArray[Any]]]) -> Comparison:
        """max|d| / max|y| over all outputs, and the SQNR of the first output on the calibration samples in dB."""
        worst = max(
            (_relative(a, b) for e, g in zip(reference, candidate, strict=True) for a, b in zip(e, g, strict=True)), default=0.0
        )
        signal = sum(float(np.square(_wide(a)).sum()) for a in _firsts(reference))
        noise = sum(
            float(np.square(_wide(a) - _wide(b)).sum()) for a, b in zip(_firsts(reference), _firsts(candidate), strict=True)
        )
        return Comparison(worst, decibel(signal, noise), len(self.feeds))


def _wide(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(array).astype(np.float64), nan=1e30)


def _firsts(outputs: list[list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """The first output on the calibration samples (the random sample comes last)."""
    return [o[0] for o in (outputs[:-1] or outputs)]


def _relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.dtype.kind not in "fV" or a.size == 0:
        return 0.0 if np.array_equal(a, b) else 1.0
    wide, other = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    odd = ~np.isfinite(wide)
    if not np.array_equal(wide[odd], other[odd], equal_nan=True):
        return float("inf")
    top = float(np.abs(wide[~odd]).max(initial=0.0))
    return float(np.abs(wide[~odd] - other[~odd]).max(initial=0.0)) / (top or 1.0)


def comparator(samples: Sequence[dict[str, NDArray[Any]]], seed: int, threads: int | None = None) -> OrtComparator:
    """On `samples`, and one random sample of the first one's shapes and value ranges."""
    return OrtComparator([*samples, _random_like(samples[0], seed)], threads)


def _random_like(feed: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {name: _random(rng, array) for name, array in feed.items()}


def _random(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """Floats uniform over the array's range; integers, bools and masks with infinities drawn from its own values."""
    if array.dtype.kind == "f" and array.size and np.isfinite(array).all():
        return rng.uniform(float(array.min()), float(array.max()), array.shape).astype(array.dtype)
    return rng.permutation(array.reshape(-1)).reshape(array.shape)
