"""What a compilation is calibrated with: data, or statistics that were gathered before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from qcompile.calib.data.checks import check_data, shapes
from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.store.shards import DataSpec
from qcompile.calib.store.stored import StoredStatistics
from qcompile.calib.sweep.provider import Sweeps
from qcompile.errors import DataError
from qcompile.execute.compare import OrtComparator, comparator
from qcompile.execute.session import batch_length, device_note
from qcompile.ir.model import Model
from qcompile.pipeline.base import Needs
from qcompile.report import Progress
from qcompile.verbs.compile.job import Job
from qcompile.verbs.compile.options import DEFAULT_SAMPLES

VERIFY_SAMPLES = 8
_FEWER = 1 << 27  # bytes of weights


@dataclass(frozen=True)
class Calibration:
    """Where statistics come from, what outputs are compared on, and what the output's metadata says about it.

    `held_back`: nothing was fitted to the samples in `compared`.
    """

    statistics: Sweeps | StoredStatistics
    source: str
    samples: int
    fingerprint: str
    random: bool
    shapes: dict[str, Any]
    sweeper: Sweeps | None
    compared: Dataset | None
    held_back: bool = False
    known: dict[Probe, Stat] = field(default_factory=dict[Probe, Stat])
    warnings: tuple[str, ...] = ()

    def collect(self, needs: Needs) -> Mapping[Probe[Any], Stat]:
        """One sweep, or what the file holds."""
        return self.statistics.collect(needs.model, needs.probes)

    @property
    def sweeps(self) -> int:
        """Sweeps so far."""
        return 0 if self.sweeper is None else self.sweeper.sweeps

    @property
    def range_warnings(self) -> list[str]:
        """What the ranges of the sweeps so far show."""
        return self.statistics.warnings if isinstance(self.statistics, Sweeps) else []

    def comparator(self, job: Job) -> OrtComparator | None:
        """On a few samples, unless verification is off or there are none."""
        if job.options.verify == "off" or self.compared is None:
            return None
        return comparator(_feeds(self.compared, job.model), job.options.seed, job.options.threads)

    def feeds(self, job: Job) -> list[dict[str, NDArray[Any]]]:
        """What the finished model is tried on where nothing is compared."""
        return [] if self.compared is None else _feeds(self.compared, job.model)


def _feeds(data: Dataset, model: Model) -> list[dict[str, NDArray[Any]]]:
    """Eight samples, as many a run as the model takes; fewer from 128 MB of weights on, so that it costs less than a sweep."""
    fixed = data.run_size(model.inputs())
    count = min(VERIFY_SAMPLES, max(2, VERIFY_SAMPLES * _FEWER // max(1, model.weight_bytes())))
    feeds = [f for f in data.take(max(count, fixed or 1)).batches(fixed or count) if fixed in (None, batch_length(f))]
    if not feeds:
        raise DataError(f"the data holds {len(data)} samples and the model needs {fixed} a run; give more samples")
    return feeds


def data_spec(job: Job, source: str) -> DataSpec:
    """How a job's data is opened."""
    o = job.options
    return DataSpec(source, o.preprocess, o.samples, DEFAULT_SAMPLES, o.seed)


def open_data(job: Job) -> Dataset | None:
    """The job's data; None where it needs none.

    Raises:
        DataError: it needs some and there is none, or it cannot be read.
    """
    if job.data_source is not None:
        data = data_spec(job, job.data_source).open(job.model)
        return replace(data, alone=True) if job.options.batch == 1 else data
    if job.options.exact or not _wants_data(job):
        return None
    raise DataError(
        "no calibration data: give some with --calib, or put"
        f" {job.model.path.stem if job.model.path else 'model'}.calib.npz beside the model"
        " (arrays named as the model's inputs, first axis = samples); --calib random is for trying things out"
    )


def open_calibration(job: Job, progress: Progress) -> Calibration | None:
    """Statistics from `--stats`, else from sweeps over the data; None where the job needs none.

    Raises:
        DataError: neither can be used, or the two do not belong together.
    """
    if job.options.stats is not None:
        return _from_file(job, str(job.options.stats), progress)
    data = open_data(job)
    return None if data is None else _from_data(job, data, progress)


def _from_data(job: Job, data: Dataset, progress: Progress) -> Calibration:
    tell_data(data, progress)
    source = sweeper(job, data, progress)
    warnings = data_warnings(job, data)
    described = (data.source, len(data), data.fingerprint(), data.random, shapes(data))
    return Calibration(source, *described, source, data.held_back or data, bool(data.held), warnings=tuple(warnings))


def data_warnings(job: Job, data: Dataset) -> list[str]:
    """What the checks of the data say; made-up data is not checked."""
    return [] if data.random else check_data(data, job.model.inputs(), job.options.preprocess)


def tell_data(data: Dataset, progress: Progress) -> None:
    """What is calibrated on, and where models run."""
    kept = f"; {len(data.held)} more are held back for the figures" if data.held else ""
    progress.note(f"calibrating on {len(data)} samples of {data.source}{kept}")
    if (note := device_note()) is not None:
        progress.note(note)


def _from_file(job: Job, path: str, progress: Progress) -> Calibration:
    """Data is used beside the file only where the command names it."""
    data = open_data(job) if job.options.calib is not None else None
    swept = None if data is None else sweeper(job, data, progress)
    stored = StoredStatistics.open(path, job.model, swept, data)
    key, about = stored.statistics.key, stored.statistics.about
    progress.note(f"statistics of {key.samples} samples from {path}")
    source = f"{about.get('source', 'unknown data')} ({path})"
    compared = stored.feeds() if data is None else data.held_back or data
    held = bool(about.get("held_back") if data is None else data.held)
    described = (source, key.samples, key.data, bool(about.get("random")), dict(about.get("shapes", {})))
    return Calibration(stored, *described, swept, compared, held, stored.known(), tuple(about.get("warnings", ())))


def sweeper(job: Job, data: Dataset, progress: Progress) -> Sweeps:
    """Sweeps over `data` as the job's options ask."""
    return Sweeps(data, job.options.threads, job.options.batch, progress.on_sweep, mem_limit=job.options.mem_limit)


def _wants_data(job: Job) -> bool:
    return (
        job.scheme.activation is not None or job.scheme.body == "float16" or any(p.kind.value == "fit" for p in job.plan.passes)
    )
