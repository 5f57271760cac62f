"""`qcompile calibrate` and `merge`: gather the statistics that a compilation would ask for, once, wherever the data lies."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile._version import __version__
from qcompile.calib.data.checks import check_ranges, shapes
from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Observer, Probe
from qcompile.calib.observe.chunks import chunk_samples
from qcompile.calib.store.gather import Enough, Gatherer
from qcompile.calib.store.merge import merge, words
from qcompile.calib.store.shards import shard_range
from qcompile.calib.store.store import Key, Range, Statistics, load, save
from qcompile.calib.sweep.sweep import batch_size
from qcompile.errors import DataError, UsageError, near
from qcompile.execute.dask_executor import DaskExecutor
from qcompile.execute.executor import Executor, ProcessExecutor
from qcompile.execute.session import RUNTIME_VERSION
from qcompile.ir.atomic import remove_stale
from qcompile.ir.model import Model
from qcompile.pipeline.base import Pass
from qcompile.pipeline.runner import Ran, Runner, Starts, drive
from qcompile.report import SCHEMA_VERSION, Progress, warned
from qcompile.verbs.calibrate.options import CalibrateOptions
from qcompile.verbs.compile.job import Job, prepare
from qcompile.verbs.compile.statistics import data_spec, data_warnings, open_data, tell_data
from qcompile.verbs.guards import require_place

FEEDS_BYTES = 1 << 24
FEEDS_SAMPLES = 8
INDEX_KEPT = 4096


@dataclass(frozen=True)
class Calibrated:
    """What a calibration left in its file."""

    output: Path
    sweeps: int
    probes: int
    samples: int
    missing: tuple[Range, ...]
    resumed: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        shown = {**dataclasses.asdict(self), "output": str(self.output), "missing": [list(r) for r in self.missing]}
        return {"schema_version": SCHEMA_VERSION, **shown}

    @property
    def missing_words(self) -> str:
        """The samples that are missing, in words."""
        return words(self.missing)


def run(model: Path, options: CalibrateOptions, progress: Progress) -> Calibrated:
    """Gather what compiling `model` asks for into the output that `options` names.

    Raises as `calibrate`, `prepare` and `executor_for`.
    """
    place = options.output or Path(f"{model.stem}.qstats")
    require_place(place, "the statistics file", [model])
    start = executor_for(options.workers, options.dask)
    job = prepare(model, options)
    try:
        return calibrate(
            job, place, progress, observers=options.observers, shard=options.shard, resume=options.resume, executor=start
        )
    except KeyboardInterrupt:
        progress.note(f"what is done is kept in {place}; the same command goes on from there")
        raise


def calibrate(
    job: Job,
    output: Path,
    progress: Progress,
    *,
    observers: Sequence[str] = (),
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    executor: Callable[[], Executor] | None = None,
) -> Calibrated:
    """Gather into `output` what the job's pipeline asks for, or `observers` of every float activation of the model.

    An output that is there and belongs to the same model, data and options is continued.

    Args:
        shard: (i, n): only the i-th of n parts of the samples, of the first sweep.
        resume: it is an error if there is nothing to continue.
        executor: starts the workers that the samples are spread over; None sweeps in this process.

    Raises:
        DataError: no data, or `output` belongs to something else.
        UsageError: an unknown observer; a job that reads no statistics.
    """
    data = open_data(job)
    if data is None:
        raise UsageError("these passes read no statistics; choose others, or name --observers")
    tell_data(data, progress)
    warnings = warned(data_warnings(job, data), progress.note)
    statistics = _opened(output, resume, _fresh(job, data, warnings))
    length = statistics.key.chunk
    span = (0, len(data)) if shard is None else shard_range(*shard, len(data), length)
    spec = data_spec(job, _absolute(str(job.data_source)))
    gatherer = Gatherer(output, statistics, data, spec, span, progress, job.options.threads, job.options.mem_limit)
    workers = executor() if executor is not None else None
    try:
        gatherer.executor = workers
        _gather(job, gatherer, observers, progress)
    finally:
        if workers is not None:
            workers.close()
    if not gatherer.statistics.sweeps:
        raise UsageError("these passes read no statistics of this model; choose others, or name --observers")
    finished = _finished(gatherer.statistics)
    save(output, finished)
    everything = tuple(finished.about["warnings"])
    warned(everything[len(warnings) :], progress.note)
    missing = tuple(finished.missing())
    return Calibrated(output, len(finished.sweeps), _probes(finished), span[1] - span[0], missing, gatherer.resumed, everything)


def merge_files(paths: Sequence[Path], output: Path) -> Calibrated:
    """Merge statistics files of disjoint samples into `output`.

    Raises:
        DataError: they do not belong together, overlap, or cannot be read.
        UsageError: `output` cannot be written, or is one of them.
    """
    require_place(output, "the statistics file", paths)
    merged = _finished(merge([(str(path), load(path)) for path in paths]))
    save(output, merged)
    missing, warnings = tuple(merged.missing()), tuple(merged.about["warnings"])
    held = merged.key.samples - sum(b - a for a, b in missing)
    return Calibrated(output, len(merged.sweeps), _probes(merged), held, missing, 0, warnings)


def executor_for(workers: int | None, dask: str | None) -> Callable[[], Executor] | None:
    """Starts the workers that the command line asks for: processes here, or a dask cluster; None for neither.

    Raises:
        UsageError: both are given.
    """
    if workers is not None and dask is not None:
        raise UsageError("--workers starts processes here and --dask uses a cluster; give one of them")
    if dask is not None:
        return lambda: DaskExecutor(dask)
    return None if workers is None else lambda: ProcessExecutor(workers)


def _gather(job: Job, gatherer: Gatherer, observers: Sequence[str], progress: Progress) -> None:
    with contextlib.suppress(Enough):
        if observers:
            gatherer.collect(job.model, _probes_of_all(job.model, observers))
            return
        passes = until_last_reader(job.plan.passes)
        steps = Runner(verify="off").steps(job.model, passes, job.context())
        drive(steps, lambda needs: gatherer.collect(needs.model, needs.probes), lambda event: _tell(event, progress))


def _tell(event: Starts | Ran, progress: Progress) -> None:
    if isinstance(event, Starts):
        progress.on_pass(event.spec, event.index, event.total)


def until_last_reader(passes: Sequence[Pass]) -> Sequence[Pass]:
    """The passes up to the last one that may ask for statistics: with `probes`, or while it works."""
    last = max((i for i, p in enumerate(passes) if _reads(type(p))), default=-1)
    return passes[: last + 1]


def _reads(cls: type[Pass]) -> bool:
    return cls.probes is not Pass.probes or cls.rounds is not Pass.rounds


def _probes_of_all(model: Model, observers: Sequence[str]) -> list[Probe]:
    """`observers` of every float tensor that a node computes, and of the float inputs; matrices and up."""
    kinds = Observer.kinds
    unknown = [o for o in observers if o not in kinds]
    if unknown:
        raise UsageError(f"unknown observer {unknown[0]!r}{near(unknown[0], kinds)} (observers: {', '.join(kinds)})")
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    floats = [v for v in values if v.name and v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and _is_activation(v)]
    return [kinds[o]().of(v) for o in observers for v in floats]


def _is_activation(value: ir.Value) -> bool:
    node = value.producer()
    return value.shape is not None and len(value.shape) >= 2 and (node is None or node.op_type != "Constant")


def _fresh(job: Job, data: Dataset, warnings: Sequence[str]) -> Statistics:
    """A file that holds nothing yet."""
    versions = {"qcompile": __version__, "onnxruntime": RUNTIME_VERSION}
    fixed = data.run_size(job.model.inputs())
    key = Key(
        job.model.digest(), data.fingerprint(), len(data), chunk_samples(fixed),
        batch_size(job.model, data, job.options.batch), job.options.seed, versions,
    )  # fmt: skip
    about = {
        "source": data.source, "random": data.random, "shapes": shapes(data), "warnings": list(warnings),
        "data_warnings": list(warnings), "index": list(data.index) if len(data) <= INDEX_KEPT else None,
        "held_back": len(data.held),
        "target": job.target.name, "scheme": job.scheme.name, "pipeline": job.pipeline,
    }  # fmt: skip
    return Statistics(key, (), about, _feeds(data.held_back or data, fixed))


def _feeds(data: Dataset, fixed: int | None) -> tuple[dict[str, Any], ...]:
    """The samples that outputs are compared on, if they are small."""
    few = data.take(max(FEEDS_SAMPLES, fixed or 1))
    feeds = tuple(feed for i in range(len(few)) for feed in replace(few, index=few.index[i : i + 1]).batches(1))
    return feeds if sum(a.nbytes for f in feeds for a in f.values()) <= FEEDS_BYTES else ()


def _opened(output: Path, resume: bool, fresh: Statistics) -> Statistics:
    """What is at `output`, or `fresh`."""
    remove_stale(output)
    if not output.exists():
        if resume:
            raise DataError(f"there is nothing to resume at {output}; leave --resume out to begin")
        return fresh
    there = load(output)
    differing = there.key.differences(fresh.key)
    mine, theirs = fresh.about["pipeline"], there.about.get("pipeline")
    differing += [] if mine == theirs else [f"the passes ({theirs} against {mine})"]
    if differing:
        raise DataError(
            f"{output} is there and belongs to something else: {'; '.join(differing)};"
            " delete it, choose another -o, or give the options that it was made with"
        )
    return there


def _finished(statistics: Statistics) -> Statistics:
    """With the warnings about ranges, which take the statistics of all samples."""
    about = statistics.about
    whole = [s for s in statistics.sweeps if not s.missing(0, statistics.key.samples)]
    found = [w for s in whole for w in check_ranges(s.stats, about.get("index"))]
    return replace(statistics, about={**about, "warnings": [*about.get("data_warnings", ()), *dict.fromkeys(found)]})


def _probes(statistics: Statistics) -> int:
    return sum(len(s.stats) for s in statistics.sweeps)


def _absolute(spec: str) -> str:
    """Workers may run in another folder."""
    file, colon, function = spec.rpartition(":")
    if file.endswith(".py"):
        return f"{Path(file).resolve()}{colon}{function}"
    return str(Path(spec).resolve()) if Path(spec).exists() else spec
