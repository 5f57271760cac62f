"""Gathers statistics into a file: sweeps that can be interrupted, continued, cut into shards and spread over workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompile.calib.data.checks import with_extremes
from qcompile.calib.data.dataset import Dataset
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.store.merge import merge
from qcompile.calib.store.shards import DataSpec, ShardTask, merge_shards, run_shard, split
from qcompile.calib.store.store import Gathered, Key, Range, Statistics, from_bytes, joined, probe_to_json, save
from qcompile.calib.sweep.provider import Sweeps
from qcompile.errors import DataError, QcompileError
from qcompile.execute.executor import Executor
from qcompile.execute.session import libraries
from qcompile.ir.model import Model
from qcompile.report import Progress

SYNC_SECONDS = 5.0
TASKS_PER_WORKER = 4


class Enough(QcompileError):
    """This shard is done: what follows needs the statistics of all shards."""


@dataclass
class Gatherer:
    """Answers probes by sweeps over samples `span` of the data, saved after every batch, continued from the file at `path`."""

    path: Path
    statistics: Statistics
    data: Dataset
    spec: DataSpec
    span: Range
    progress: Progress
    threads: int | None = None
    mem_limit: int | None = None
    executor: Executor | None = None
    resumed: int = 0
    synced: float = field(default_factory=time.monotonic)

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """Statistics over all samples.

        Raises:
            DataError: the file holds other probes of this graph.
            Enough: the statistics of other shards are still missing.
        """
        held = self._held(model.digest(), with_extremes(probes))
        gaps = held.missing(*self.span)
        self.resumed += self.span[1] - self.span[0] - sum(b - a for a, b in gaps)
        if gaps and self.executor is not None:
            held = self._spread(model, held, gaps, self.executor)
        for gap in gaps if self.executor is None else ():
            held = self._sweep(model, held, gap)
        self._keep(held, sync=True)
        if held.missing(0, len(self.data)):
            raise Enough("the rest needs all shards")
        return {p: held.stats[p] for p in probes}

    def _held(self, graph: str, probes: Sequence[Probe]) -> Gathered:
        held = self.statistics.sweep_of(graph)
        if held is None:
            return Gathered(graph, (), {p: p.observer.empty() for p in probes})
        if odd := held.stats.keys() ^ set(probes):
            raise DataError(
                f"{self.path} holds other probes than this command asks for ({len(odd)} differ, first: tensor"
                f" {next(iter(odd)).tensor!r}); give the options that it was made with, or choose another -o"
            )
        return held

    def _sweep(self, model: Model, held: Gathered, gap: Range) -> Gathered:
        start, stop = gap

        def on_batch(stats: dict[Probe, Stat], done: int) -> None:
            now = replace(held, ranges=tuple(joined([*held.ranges, (start, done)])), stats=dict(stats))
            self._keep(now, sync=time.monotonic() - self.synced > SYNC_SECONDS)

        sweeps = Sweeps(self.data, self.threads, self.statistics.key.batch, self.progress.on_sweep, self.mem_limit)
        found = sweeps.part(model, list(held.stats), start, stop, held.stats, on_batch)
        return replace(held, ranges=tuple(joined([*held.ranges, gap])), stats=found)

    def _spread(self, model: Model, held: Gathered, gaps: Sequence[Range], executor: Executor) -> Gathered:
        """Chunks as tasks; what comes back is merged and saved at once."""
        length = self.statistics.key.chunk
        with self._model_file(model) as (path, digest):
            ranges = split(gaps, length, TASKS_PER_WORKER * executor.workers)
            tasks = [self._task(path, digest, held, r) for r in ranges]
            total, done = sum(b - a for a, b in ranges), set[int]()

            def on_task(index: int) -> None:
                done.add(index)
                self.progress.on_sweep(sum(ranges[i][1] - ranges[i][0] for i in list(done)), total)

            for _, result in executor.results(run_shard, tasks, merge_shards, on_task):
                if (part := from_bytes(result).sweep_of(held.graph)) is None:
                    raise DataError("a worker sent statistics of another graph; give all workers the same qcompile")
                held = _added(held, part, self.statistics.key)
                self._keep(held, sync=True)
        return held

    def _task(self, path: Path, digest: str, held: Gathered, r: Range) -> ShardTask:
        key = json.dumps(dataclasses.asdict(self.statistics.key))
        probes = json.dumps([probe_to_json(p) for p in held.stats])
        return ShardTask(str(path), digest, held.graph, self.spec, key, probes, *r, self.threads, self.mem_limit, libraries())

    @contextlib.contextmanager
    def _model_file(self, model: Model) -> Any:
        """(path, digest) of a file that workers can load: the source where nothing was rewritten, else one beside the output."""
        digest = model.digest()
        if digest == self.statistics.key.model and model.path is not None:
            yield model.path.resolve(), digest
            return
        folder = self.path.resolve().with_name(f".{self.path.name}.{digest[:12]}")
        folder.mkdir(exist_ok=True)
        try:
            yield model.save(folder / "model.onnx"), digest
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, held: Gathered, *, sync: bool) -> None:
        self.statistics = self.statistics.with_sweep(held)
        save(self.path, self.statistics, sync=sync)
        if sync:
            self.synced = time.monotonic()


def _added(held: Gathered, part: Gathered, key: Key) -> Gathered:
    merged = merge([("the file", Statistics(key, (held,))), ("a shard", Statistics(key, (part,)))]).sweeps[0]
    return merged.folded(key.chunk, key.samples)
