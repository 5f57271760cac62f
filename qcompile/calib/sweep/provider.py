"""Sweeps over calibration data: the one place that decides how a model is run to answer probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from qcompile.calib.data.checks import check_ranges, with_extremes
from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.blocks import block_bytes, blocked_sweep, plan_blocks
from qcompile.calib.sweep.memory import MemoryPlan, plan_memory
from qcompile.calib.sweep.sweep import OnBatch, batch_size, sweep
from qcompile.execute.emulate.runnable import runnable
from qcompile.ir.model import Model
from qcompile.report import Meter


@dataclass
class Sweeps:
    """Answers probes by running a model over `data`: what ONNX Runtime has no kernels for emulated, whole or in blocks,
    `batch` samples a run (see `batch_size`), the process growing by at most `mem_limit` bytes.

    `sweeps` counts the answers, `warnings` tell which tensors' ranges a single sample sets.
    """

    data: Dataset
    threads: int | None = None
    batch: int | None = None
    progress: Meter | None = None
    mem_limit: int | None = None
    sweeps: int = 0
    warnings: list[str] = field(default_factory=list[str])

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """The probes' statistics over all samples.  Raises as `qcompile.calib.sweep.sweep.sweep`."""
        self.sweeps += 1
        found = self.part(model, with_extremes(probes))
        self.warnings += [w for w in check_ranges(found, self.data.index) if w not in self.warnings]
        return {p: found[p] for p in probes}

    def part(
        self,
        model: Model,
        probes: Sequence[Probe],
        start: int = 0,
        stop: int | None = None,
        known: Mapping[Probe, Stat] | None = None,
        on_batch: OnBatch | None = None,
    ) -> dict[Probe, Stat]:
        """Just these probes, over samples `start` to `stop`, on top of `known` (see `qcompile.calib.sweep.sweep.sweep`)."""
        ready = runnable(model)
        limit = block_bytes(ready, self.mem_limit)
        run = sweep if limit is None else partial(blocked_sweep, limit=limit)
        return run(
            ready, self.data, probes, batch=self.batch, threads=self.threads, progress=self.progress, start=start, stop=stop,
            known=known, on_batch=on_batch, mem_limit=self.mem_limit,
        )  # fmt: skip

    def plan(self, model: Model, probes: Sequence[Probe]) -> MemoryPlan:
        """The memory that `collect` would take.  Raises as `qcompile.calib.sweep.memory.plan_memory`."""
        ready = runnable(model)
        limit = block_bytes(ready, self.mem_limit)
        plan = plan_memory if limit is None else partial(plan_blocks, limit=limit)
        size = batch_size(ready, self.data, self.batch)
        return plan(ready, self.data, with_extremes(probes), size, self.mem_limit)
