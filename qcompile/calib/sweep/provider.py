"""Statistics by sweeps over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.blocks import block_bytes, plan_blocks, sweep_within
from qcompile.calib.sweep.memory import MemoryPlan, plan_memory
from qcompile.calib.sweep.sweep import batch_size
from qcompile.execute.emulate.runnable import runnable
from qcompile.ir.model import Model


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
        """The memory that `collect` would take.  Raises as `qcompile.calib.sweep.memory.plan_memory`."""
        ready = runnable(model)
        limit = block_bytes(ready, self.mem_limit)
        plan = plan_memory if limit is None else partial(plan_blocks, limit=limit)
        return plan(ready, self.data, probes, batch_size(ready, len(self.data), self.batch), self.mem_limit)
