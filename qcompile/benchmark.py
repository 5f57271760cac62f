"""`qcompile bench`: latencies of several models that can be compared, because nothing but the model differs.

The runs of all models are interleaved in random order, and idle thread pools do not spin: with ONNX Runtime's default
the pools of the other sessions hold the cores, and ratios scatter by half.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qcompile.calib.data import Dataset, fixed_batch
from qcompile.errors import DataError, UsageError
from qcompile.ir.model import InputInfo, Model
from qcompile.report import SCHEMA_VERSION
from qcompile.runtime.feeds import Feeds, cast_feeds, pad_batch
from qcompile.runtime.session import make_session, run

DEFAULT_RUNS = 40
WARM_UP = 5
DYNAMIC_LENGTH = 32
BATCH_NAMES = frozenset({"n", "b", "batch", "batch_size", "bs"})
Progress = Callable[[int, int], None]


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int = 2,
    runs: int = DEFAULT_RUNS,
    seed: int = 0,
    data: Dataset | None = None,
    use: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time one sample through each model.

    Args:
        threads: intra-op threads of each session.
        runs: timed runs of each model, after 5 untimed ones.
        seed: of the order of the runs and of the made-up inputs.
        data: real inputs (the first sample is used); None makes them up: standard normal reals, integers 0 and 1.
        use: execution providers; default CUDA when usable, else the CPU.
        progress: called with (runs done, runs in all).

    Returns:
        `schema_version, threads, runs, models` (`path, median_ms, min_ms`) and `ratios` (`path, median, min`): how many
        times as fast as the first model.

    Raises:
        UsageError: no models, or fewer than one run.
        ModelError: a model does not load.
        DataError: `data` holds no sample.
        InputError: ONNX Runtime fails on the inputs.
    """
    if not paths or runs < 1:
        raise UsageError("bench needs at least one model and one run")
    sessions = [make_session(p, threads=threads, use=use) for p in paths]
    feeds = [_feeds(Model.load(p), s, data, seed) for p, s in zip(paths, sessions, strict=True)]
    times = _times(sessions, feeds, runs, random.Random(seed), progress)
    models = [_timing(p, t) for p, t in zip(paths, times, strict=True)]
    return {"schema_version": SCHEMA_VERSION, "threads": threads, "runs": runs, "models": models, "ratios": _ratios(models)}


def made_up_inputs(inputs: Sequence[InputInfo], seed: int = 0) -> Feeds:
    """One sample for each input: standard normal reals, integers and booleans 0 or 1 (safe as indices and masks).

    A dynamic first axis is 1, dynamic axes named like a batch too, others 32.
    """
    rng = np.random.default_rng(seed)
    return {i.name: _made_up(i, rng) for i in inputs}


def _made_up(info: InputInfo, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = tuple(_size(dim, axis) for axis, dim in enumerate(info.shape))
    if info.dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(info.dtype)
    return rng.standard_normal(shape).astype(np.float32).astype(info.dtype)


def _size(dim: int | str | None, axis: int) -> int:
    if isinstance(dim, int):
        return dim
    return 1 if axis == 0 or str(dim).lower() in BATCH_NAMES else DYNAMIC_LENGTH


def _feeds(model: Model, session: ort.InferenceSession, data: Dataset | None, seed: int) -> Feeds:
    if data is None:
        return made_up_inputs(model.inputs(), seed)
    sample = next(data.batches(1), None)
    if sample is None:
        raise DataError("the data holds no sample to time; give more data")
    fixed = fixed_batch(model.inputs())
    return cast_feeds(session, pad_batch(sample, fixed) if fixed else sample)


def _times(
    sessions: Sequence[ort.InferenceSession], feeds: Sequence[Feeds], runs: int, order: random.Random, progress: Progress | None
) -> list[list[float]]:
    """Milliseconds of every run of every session."""
    for session, feed in zip(sessions, feeds, strict=True):
        for _ in range(WARM_UP):
            run(session, feed)
    times: list[list[float]] = [[] for _ in sessions]
    turns = list(range(len(sessions)))
    for i in range(runs):
        order.shuffle(turns)
        for turn in turns:
            start = time.perf_counter()
            sessions[turn].run(None, feeds[turn])
            times[turn].append(1e3 * (time.perf_counter() - start))
        if progress is not None:
            progress(i + 1, runs)
    return times


def _timing(path: str | Path, times: list[float]) -> dict[str, Any]:
    return {"path": str(path), "median_ms": statistics.median(times), "min_ms": min(times)}


def _ratios(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = models[0]
    return [
        {"path": m["path"], "median": first["median_ms"] / m["median_ms"], "min": first["min_ms"] / m["min_ms"]} for m in models
    ]
