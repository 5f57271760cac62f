"""Run by test_memory.py in a process of its own: how far a compilation's first sweep grows it, against `--dry-run`.

python -m tests.calib.sweep.first_sweep_memory MODEL DATA LIMIT        (LIMIT 0: none)
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.provider import Sweeps
from qcompile.errors import QcompileError
from qcompile.execute.session import providers
from qcompile.ir.model import Model
from qcompile.pipeline.base import Needs
from qcompile.pipeline.runner import Runner
from qcompile.report import Silent
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.run import run
from tools.bench_large import anonymous

EVERY_SECONDS = 0.002


class Enough(QcompileError):
    """The first sweep is over."""


class Watched(Sweeps):
    """Watches the process's anonymous memory during a sweep, then ends the compilation."""

    grown = 0

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        done = threading.Event()
        before = anonymous("self")

        def watch() -> None:
            while not done.wait(EVERY_SECONDS):
                Watched.grown = max(Watched.grown, anonymous("self") - before)

        thread = threading.Thread(target=watch)
        thread.start()
        super().collect(model, probes)
        done.set()
        thread.join()
        raise Enough


def main(model: str, data: str, limit: int | None) -> None:
    import qcompile.verbs.compile.statistics as calibration

    options = Options(calib=data, output=Path(data).with_name("out.onnx"), mem_limit=limit, threads=1, verify="off")
    job = prepare(model, options)
    first = next(e for e in Runner(verify="off").steps(job.model, job.plan.passes, job.context()) if isinstance(e, Needs))
    found = calibration.open_data(job)
    assert found is not None
    plan = calibration.sweeper(job, found, Silent()).plan(first.model, first.probes)
    providers()
    calibration.Sweeps = Watched
    try:
        run(job, Silent())
    except Enough:
        print(json.dumps({"predicted": plan.predicted_bytes, "grown": Watched.grown, "blocks": plan.blocks}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) or None)
