"""`qcompile bench`: latencies of several models that can be compared, because nothing but the model differs.

The runs of all models are interleaved in random order, and idle thread pools do not spin: with ONNX Runtime's default
the pools of the other sessions hold the cores, and ratios scatter by half.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.runs import made_up_shapes
from qcompile.errors import DataError, ModelError, UsageError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.feeds import Feeds, cast_feeds, pad_batch
from qcompile.execute.session import Session, make_session, run
from qcompile.execute.timing import Ratio, Timing, interleaved, made_up, ratios, timing
from qcompile.ir.model import InputInfo, Model
from qcompile.report import SCHEMA_VERSION, Meter
from qcompile.verbs.libraries import OrtLibraryOptions, PluginOptions
from qcompile.verbs.options import Written

DEFAULT_RUNS = 40


@dataclass(frozen=True, kw_only=True)
class BenchOptions(OrtLibraryOptions, PluginOptions):
    """How they are timed."""

    threads: Annotated[int, "ONNX Runtime threads.", Written(least=1)] = 2
    runs: Annotated[int, "Timed runs of each model.", Written(least=1)] = DEFAULT_RUNS


@dataclass(frozen=True)
class Benched:
    """Latencies of models on ONNX Runtime, and how many times as fast as the first each one is."""

    threads: int
    runs: int
    models: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]

    def to_json(self) -> dict[str, Any]:
        """`schema_version, threads, runs, models, ratios`."""
        return {
            "schema_version": SCHEMA_VERSION, "threads": self.threads, "runs": self.runs,
            "models": [m.to_json() for m in self.models], "ratios": [r.to_json() for r in self.ratios],
        }  # fmt: skip


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int = 2,
    runs: int = DEFAULT_RUNS,
    seed: int = 0,
    data: Dataset | None = None,
    use: Sequence[str] | None = None,
    progress: Meter | None = None,
) -> Benched:
    """Time one sample through each model.

    Args:
        threads: intra-op threads of each session.
        runs: timed runs of each model, after 5 untimed ones.
        seed: of the order of the runs and of the made-up inputs.
        data: real inputs (the first sample is used); None makes them up: standard normal reals, integers 0 and 1.
        use: execution providers; default CUDA when usable, else the CPU.
        progress: called with (runs done, runs in all).

    Raises:
        UsageError: no models, or fewer than one run.
        ModelError: a model does not load, or ONNX Runtime lacks its formats.
        DataError: `data` holds no sample.
        InputError: ONNX Runtime fails on the inputs.
    """
    if not paths or runs < 1:
        raise UsageError("bench needs at least one model and one run")
    models = [Model.load(p) for p in paths]
    for path, model in zip(paths, models, strict=True):
        _require_kernels(path, model)
    sessions = [make_session(p, threads=threads, use=use) for p in paths]
    feeds = [_feeds(m, s, data, seed) for m, s in zip(models, sessions, strict=True)]
    calls = [_call(s, f) for s, f in zip(sessions, feeds, strict=True)]
    times = interleaved(calls, runs, random.Random(seed), progress)
    timings = tuple(timing(p, t) for p, t in zip(paths, times, strict=True))
    return Benched(threads, runs, timings, ratios(timings))


def _require_kernels(path: str | Path, model: Model) -> None:
    if runnable(model) is not model:
        raise ModelError(
            f"{path} holds operators that ONNX Runtime has no kernels for (FP4, MXFP8): a time measured here would say nothing;"
            " use qcompile eval for its accuracy, qcompile audit for its kernels"
        )


def made_up_inputs(inputs: Sequence[InputInfo], seed: int = 0) -> Feeds:
    """One sample for each input: standard normal reals, integers and booleans 0 or 1 (safe as indices and masks).

    Dynamic axes as in `qcompile.calib.data.runs.made_up_shapes`.
    """
    rng = np.random.default_rng(seed)
    shapes = made_up_shapes(inputs)
    return {i.name: made_up(shapes[i.name], i.dtype, rng) for i in inputs}


def _feeds(model: Model, session: Session, data: Dataset | None, seed: int) -> Feeds:
    if data is None:
        return made_up_inputs(model.inputs(), seed)
    sample = next(data.batches(1), None)
    if sample is None:
        raise DataError("the data holds no sample to time; give more data")
    fixed = data.run_size(model.inputs())
    return cast_feeds(session, pad_batch(sample, fixed) if fixed else sample)


def _call(session: Session, feeds: Feeds) -> Callable[[], object]:
    """One run of the session, for timing."""
    run(session, feeds, fall_back=False)  # failures are told before the clock starts
    return lambda: session.run(None, feeds)
