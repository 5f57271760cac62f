"""A rehearsal: the whole pipeline on a few samples, to say what the run will need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.memory import MemoryPlan
from qcompile.pipeline.base import Needs
from qcompile.pipeline.runner import Runner, drive
from qcompile.report import SILENT
from qcompile.verbs.compile.job import Job
from qcompile.verbs.compile.statistics import Calibration, open_calibration, open_data, sweeper

SAMPLES = 8


@dataclass
class Rehearsal:
    """Which passes the sweeps of a run are for, in order, and the memory plan of the first; None where nothing is swept.

    `samples`: how many the passes were shown.  What a pass finds in more of them could call for another sweep or save one.
    """

    samples: int = 0
    sweeps: list[str] = field(default_factory=list[str])
    memory: MemoryPlan | None = None


def rehearse(job: Job) -> Rehearsal:
    """Run the job's passes on its first samples, or on its statistics file; nothing is compared or written.

    Raises:
        DataError: the data cannot be used.
        UsageError: `mem_limit` is below what a single probe needs.
    """
    found = Rehearsal()
    runner = Runner(verify="off")
    if job.options.stats is not None:
        calibration = open_calibration(job, SILENT)
        assert calibration is not None
        runner.known, found.samples = calibration.known, calibration.samples
        answer: Callable[[Needs], Mapping[Probe[Any], Stat]] = partial(_from_file, calibration, found)
    else:
        data = open_data(job)
        if data is None:
            return found
        answer = _OnFew(job, data, found).collect
    drive(runner.steps(job.model, job.plan.passes, job.context()), answer)
    return found


def _from_file(calibration: Calibration, found: Rehearsal, needs: Needs) -> Mapping[Probe[Any], Stat]:
    before = calibration.sweeps
    answers = calibration.collect(needs)
    found.sweeps += [needs.by] * (calibration.sweeps - before)
    return answers


@dataclass
class _OnFew:
    """Sweeps over the first samples of `data`; the first one is planned for all of them."""

    job: Job
    data: Dataset
    found: Rehearsal

    def collect(self, needs: Needs) -> Mapping[Probe[Any], Stat]:
        self.found.sweeps.append(needs.by)
        if self.found.memory is None:
            whole = sweeper(self.job, self.data, SILENT)
            self.found.memory = whole.plan(needs.model, needs.probes)
        few = self.data.take(max(SAMPLES, self.data.run_size(self.job.model.inputs()) or 0))
        self.found.samples = len(few)
        return sweeper(self.job, few, SILENT).collect(needs.model, needs.probes)
