"""What the runner is given: statistics by sweeps over the calibration data, and a comparator on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset, fixed_batch
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.blocks import block_bytes, plan_blocks, sweep_within
from qcompile.calib.sweep.memory import MemoryPlan
from qcompile.calib.sweep.memory import plan as plan_memory
from qcompile.calib.sweep.sweep import batch_size
from qcompile.errors import DataError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.metrics import decibel
from qcompile.execute.serving import open_session, run_in_parts
from qcompile.execute.session import batch_length
from qcompile.ir.model import InputInfo, Model
from qcompile.ir.spill import is_large
from qcompile.pipeline.base import Comparison

VERIFY_SAMPLES = 8
PART_BYTES = 1 << 26


@dataclass
class SweepStatistics:
    """Answers probes with one sweep a call; counts the sweeps."""

    data: Dataset
    threads: int | None = None
    batch: int | None = None
    progress: Callable[[int, int], None] | None = None
    sweeps: int = 0
    mem_limit: int | None = None

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """Run `model` over the data once and reduce every probed tensor; in blocks where its weights exceed half the memory."""
        self.sweeps += 1
        ready = runnable(model)
        run = sweep_within(ready, self.mem_limit)
        return run(ready, self.data, probes, batch=self.batch, threads=self.threads, progress=self.progress)

    def plan(self, model: Model, probes: Sequence[Probe]) -> MemoryPlan:
        """The memory that `collect` would take.  Raises as `qcompile.calib.sweep.memory.plan`."""
        ready = runnable(model)
        limit = block_bytes(ready, self.mem_limit)
        plan = plan_memory if limit is None else partial(plan_blocks, limit=limit)
        return plan(ready, self.data, probes, batch_size(ready, len(self.data), self.batch), self.mem_limit)


@dataclass
class OrtComparator:
    """Runs models on 8 calibration samples plus one random one, optimizations off, Q/DQ simulated exactly."""

    feeds: list[dict[str, NDArray[Any]]]
    threads: int | None = None

    def outputs(self, model: Model) -> list[list[NDArray[Any]]]:
        """All outputs for every feed."""
        ready = runnable(model)
        if is_large(ready.graph):
            return run_in_parts(ready, self.feeds, PART_BYTES, qdq_fusion=False, threads=self.threads)
        session = open_session(ready, optimize="off", qdq_fusion=False, threads=self.threads)
        return [[np.asarray(y) for y in session.run(None, feed)] for feed in self.feeds]

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


def comparator(data: Dataset, inputs: Sequence[InputInfo], seed: int, threads: int | None = None) -> OrtComparator:
    """Eight calibration samples, and one random sample of the same shapes and value ranges."""
    fixed = fixed_batch(inputs)
    feeds = [f for f in data.take(VERIFY_SAMPLES).batches(fixed or VERIFY_SAMPLES) if fixed in (None, batch_length(f))]
    if not feeds:
        raise DataError(f"the data holds {len(data)} samples and the model needs {fixed} a run; give more samples")
    return OrtComparator([*feeds, _random_like(feeds[0], seed)], threads)


def _random_like(feed: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {name: _random(rng, array) for name, array in feed.items()}


def _random(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """Floats uniform over the array's range; integers and bools drawn from its own values."""
    if array.dtype.kind == "f" and array.size:
        return rng.uniform(float(array.min()), float(array.max()), array.shape).astype(array.dtype)
    return rng.permutation(array.reshape(-1)).reshape(array.shape)
