"""One pass over the data that answers many probes, near the speed of inference.

Statistics are reduced inside the graph by ONNX Runtime's own kernels where they can be (`qcompile.calib.sweep.instrument`), so
that only small results leave the session; what is left to do outside (histograms, sampling rows) is done for one
batch while ONNX Runtime runs the next.  Statistics are merged batch by batch: memory does not grow with the samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.observe.chunks import chunk_samples, segments
from qcompile.calib.sweep.instrument import Instrumented, instrument, raw_tensor
from qcompile.calib.sweep.memory import give_back, keep_no_pieces, plan_memory
from qcompile.calib.sweep.readout import Arrays, Batch
from qcompile.errors import DataError
from qcompile.execute.opening import open_model
from qcompile.execute.session import batch_length, run
from qcompile.ir.model import Model
from qcompile.report import Meter

DEFAULT_BATCH = 8
_MERGERS = os.cpu_count() or 1
_SEGMENT_CHUNKS = 16

OnBatch = Callable[[dict[Probe, Stat], int], None]


def sweep(
    model: Model,
    data: Dataset,
    probes: Sequence[Probe],
    *,
    batch: int | None = None,
    threads: int | None = None,
    progress: Meter | None = None,
    start: int = 0,
    stop: int | None = None,
    known: Mapping[Probe, Stat] | None = None,
    on_batch: OnBatch | None = None,
    mem_limit: int | None = None,
) -> dict[Probe, Stat]:
    """Run samples `start` to `stop` of `data` through `model` once and return every probe's statistic.

    Args:
        batch: samples a run (default 8); a model with a fixed batch axis decides itself, and a rest that does
            not fill it is left out.
        threads: of ONNX Runtime.
        progress: called with (samples done, samples in all) after each run.
        start: a chunk boundary (`qcompile.calib.observe.chunks`), or where an earlier run with the same batch size stopped.
        known: statistics to continue from.
        on_batch: called with all statistics and the number of the next sample after every merged batch; where
            `mem_limit` needs several sweeps, after every 16 chunks.
        mem_limit: bytes that the process may grow by: the probes are spread over as many sweeps as that takes, and the C
            library keeps no large freed pieces any more (`keep_no_pieces`).

    Raises:
        ModelError: a probed tensor is not in the main graph, or ONNX Runtime cannot load the graph.
        DataError: NaN or infinite values in a probed tensor; no samples, or fewer than the fixed batch.
        UsageError: `mem_limit` is below what a single probe needs.
    """
    if not probes:
        return {}
    wanted = list(dict.fromkeys(probes))
    stats: dict[Probe, Stat] = {p: p.observer.empty() for p in wanted} | {p: s for p, s in (known or {}).items() if p in wanted}
    end = len(data) if stop is None else min(stop, len(data))
    size = batch_size(model, data, batch)
    groups = [wanted]
    if mem_limit is not None:
        keep_no_pieces()
        groups = [list(s.probes) for s in plan_memory(model, data, wanted, size, mem_limit).sweeps]
    if len(groups) == 1:
        return Sweep(model, data, wanted, size, threads, mem_limit is None).run(stats, start, end, progress, on_batch)
    length = None if on_batch is None else _SEGMENT_CHUNKS * chunk_samples(data.run_size(model.inputs()))
    done = _Counted(progress, (end - start) * len(groups))
    for first, last in segments(start, end, length):
        for group in groups:
            one = Sweep(model, data, group, size, threads, arena=False)
            stats |= one.run({p: stats[p] for p in group}, first, last, done.within)
            done.finish(last - first)
        if on_batch is not None:
            on_batch(stats, last)
    return stats


def batch_size(model: Model, data: Dataset, batch: int | None = None) -> int:
    """Samples a run: the model's fixed batch axis, else `batch`, else 8.

    Raises:
        DataError: fewer samples than one run needs.
    """
    fixed = data.run_size(model.inputs())
    least, available = fixed or 1, len(data)
    if available < least:
        raise DataError(f"the data holds {available} samples and the model needs {least} a run; give more samples")
    if data.alone:
        return 1
    return fixed or min(batch or DEFAULT_BATCH, available)


@dataclass
class _Counted:
    """Progress over several sweeps."""

    progress: Meter | None
    total: int
    before: int = 0

    def within(self, done: int, _: int) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.total)

    def finish(self, samples: int) -> None:
        self.before += samples


@dataclass
class Sweep:
    """One session that answers `probes` over ranges of samples; each probe's tally is only touched by one thread at a time.

    `arena` False gives memory back after every use and every batch (see `qcompile.execute.session.make_session`).
    """

    model: Model
    data: Dataset
    probes: Sequence[Probe]
    size: int = DEFAULT_BATCH
    threads: int | None = None
    arena: bool = True

    def __post_init__(self) -> None:
        self.plan: Instrumented = instrument(self.model, self.probes)
        self.session = open_model(self.plan.model, threads=self.threads, arena=self.arena)
        self.outputs = [str(o.name) for o in self.plan.model.graph.outputs]
        self.taken = {i.name for i in self.session.get_inputs()}

    def run(
        self,
        stats: dict[Probe, Stat],
        start: int,
        end: int,
        progress: Meter | None = None,
        on_batch: OnBatch | None = None,
    ) -> dict[Probe, Stat]:
        """`stats` with samples `start` to `end` merged in: the batches in order, each merged while the next one runs."""
        tallies = {p: p.observer.tally(s) for p, s in stats.items()}
        shares = [list(tallies)[i::_MERGERS] for i in range(_MERGERS)]
        pending: list[Future[None]] = []
        done = start

        def merge(batch: Batch, share: Sequence[Probe]) -> None:
            for probe in share:
                batch.add_to(tallies[probe], probe)

        def settle() -> None:
            if not pending:
                return
            for merged in pending:
                merged.result()
            if not self.arena:
                give_back()
            if progress is not None:
                progress(done - start, end - start)
            if on_batch is not None:
                on_batch({p: t.told() for p, t in tallies.items()}, done)

        # BLAS in one thread: its idle threads spin, and the cores belong to ONNX Runtime.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(_MERGERS) as workers:
            for feeds, first, chunk in self._batches(start, end):
                batch = self._answered(feeds, first, chunk)
                settle()
                done = first + batch.held
                pending = [workers.submit(merge, batch, share) for share in shares]
                del batch
            settle()
        return {p: t.told() for p, t in tallies.items()}

    def _batches(self, start: int, end: int) -> Iterator[tuple[Arrays, int, int]]:
        """(inputs, number of the first sample, chunk); no batch crosses a chunk boundary."""
        fixed = self.data.run_size(self.model.inputs())
        length, first = chunk_samples(fixed), start
        while first < end:
            chunk = first // length
            stop = min((chunk + 1) * length, end)
            for feeds in replace(self.data, index=self.data.index[first:stop]).batches(self.size):
                held = batch_length(feeds)
                if fixed is not None and held != fixed:
                    return
                yield feeds, first, chunk
                first += held

    def _answered(self, feeds: Arrays, first: int, chunk: int) -> Batch:
        """The outputs on a batch."""
        used = {k: v for k, v in feeds.items() if k in self.taken}
        found = dict(zip(self.outputs, run(self.session, used, self.outputs, first), strict=True))
        batch = Batch(self.plan, found, first, batch_length(feeds), chunk)
        batch.require_finite(self.model, lambda tensor: self._fetch(tensor, feeds, first))
        return batch

    def _fetch(self, tensor: str, feeds: Arrays, first: int) -> NDArray[Any]:
        """The raw tensor of one batch, by a session of its own."""
        session = open_model(raw_tensor(self.model, tensor))
        wanted = {i.name for i in session.get_inputs()}
        return run(session, {k: v for k, v in feeds.items() if k in wanted}, None, first)[0]
