"""`--dry-run`: what a job would do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.calib.sweep.memory import MemoryPlan
from qcompile.pipeline.describe import first_line
from qcompile.pipeline.spec import format_pass
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.compile.job import Job
from qcompile.verbs.compile.options import DEFAULT_SAMPLES
from qcompile.verbs.compile.rehearse import Rehearsal, rehearse

__all__ = ["DryRun", "MemoryPlan", "PlannedPass", "Rehearsal", "dry_run"]


@dataclass(frozen=True)
class PlannedPass:
    """A pass that would run: its spec, its help, and whether the compiler inserted it."""

    spec: str
    help: str
    inserted: bool

    def to_json(self) -> dict[str, Any]:
        """The keys pass, help, inserted."""
        return {"pass": self.spec, "help": self.help, "inserted": self.inserted}


@dataclass(frozen=True)
class DryRun:
    """A job's pipeline, data and sweeps.

    `default`: the pipeline is the target's, nobody named passes.
    """

    pipeline: str
    target: str
    scheme: str
    output: Path
    calibration: str
    rehearsal: Rehearsal
    mem_limit: int | None
    passes: tuple[PlannedPass, ...]
    default: bool

    def to_json(self) -> dict[str, Any]:
        """`schema_version, pipeline, target, scheme, output, calibration, sweeps, memory, passes`."""
        shown = {name: getattr(self, name) for name in ("pipeline", "target", "scheme", "calibration")}
        return {
            "schema_version": SCHEMA_VERSION, **shown, "output": str(self.output), "sweeps": len(self.rehearsal.sweeps),
            "memory": self._memory(),
            "passes": [p.to_json() for p in self.passes],
        }  # fmt: skip

    def _memory(self) -> dict[str, Any] | None:
        if (plan := self.rehearsal.memory) is None:
            return None
        runs = [{"probes": len(s.probes), "predicted_bytes": s.predicted_bytes} for s in plan.sweeps]
        return {"batch": plan.batch, "blocks": plan.blocks, "limit_bytes": self.mem_limit, "runs": runs}


def dry_run(job: Job) -> DryRun:
    """What `run` would do: the passes are rehearsed on a few samples, and nothing is written.

    Raises as `rehearse`.
    """
    passes = zip(job.plan.passes, job.plan.inserted, strict=True)
    return DryRun(
        job.pipeline,
        job.target.name,
        job.scheme.name,
        job.output,
        _calibration(job),
        rehearse(job),
        job.options.mem_limit,
        tuple(PlannedPass(format_pass(p), first_line(p), inserted) for p, inserted in passes),
        job.options.passes is None,
    )


def _calibration(job: Job) -> str:
    """Which data, how many samples, and whether convention chose it."""
    if job.options.stats is not None:
        return f"statistics from {job.options.stats}"
    if job.data_source is None:
        return "none found"
    how = " (found beside the model; --calib chooses other data)" if job.options.calib is None else ""
    count = job.options.samples or f"at most {DEFAULT_SAMPLES}"
    return f"{count} samples of {job.data_source}{how}"
