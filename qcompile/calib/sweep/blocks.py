"""A sweep over a model that does not fit in memory: block after block, each over all samples.

The weights of one block are read at a time, once.  What crosses to the next block is written to a scratch file, run by run.
"""

from __future__ import annotations

import functools
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import Arrays
from qcompile.calib.observe import Observer, Probe, Stat
from qcompile.calib.observe.chunks import chunk_samples, segments
from qcompile.calib.sweep.instrument import tensors_of
from qcompile.calib.sweep.memory import MemoryPlan, statistics_bytes, tensor_bytes, tiled, with_margin
from qcompile.calib.sweep.sweep import batch_size, sweep
from qcompile.errors import DataError
from qcompile.execute.session import SAMPLES
from qcompile.ir.cut import BLOCK_NODES, Block, computed_bytes, cut, part, typed
from qcompile.ir.masks import keep_masked, masked_tensors
from qcompile.ir.model import Model
from qcompile.ir.spill import is_large, mark_large, scratch_folder
from qcompile.report import Meter

_LOADING = 5  # times its weights: a smaller limit leaves too little beside them to run at once
_MANY = 3  # blocks' worth of nodes
_COMPUTED = 1 << 28  # bytes of dequantized weights at a time


def block_bytes(model: Model, mem_limit: int | None = None) -> int | None:
    """Bytes of weights for a block, where `model` should run in blocks, else None.

    A large model, whose weights are mapped, should when they exceed half the memory (or `mem_limit`): each run would read
    them from the disk again.  It also should when it dequantizes weights: those of a whole graph are computed before the
    first is used, and are not mapped.  A smaller one should when loading it whole takes more than `mem_limit`, or when it has so
    many nodes that opening it whole takes longer than opening its parts: the nodes alone bound these.
    """
    weights = model.weight_bytes()
    if is_large(model.graph):
        memory = psutil.virtual_memory().total if mem_limit is None else mem_limit
        if computed_bytes(typed(model)) > _COMPUTED:
            return min(memory // 4, _COMPUTED)
        return memory // 4 if weights > memory // 2 else None
    if mem_limit is not None and _LOADING * weights > mem_limit:
        return mem_limit // 16
    return weights if len(model.graph) > _MANY * BLOCK_NODES else None


def blocked_sweep(
    model: Model,
    data: Dataset,
    probes: Sequence[Probe],
    *,
    limit: int,
    batch: int | None = None,
    threads: int | None = None,
    progress: Meter | None = None,
    start: int = 0,
    stop: int | None = None,
    known: Mapping[Probe, Stat] | None = None,
    on_batch: Callable[[dict[Probe, Stat], int], None] | None = None,
    mem_limit: int | None = None,
) -> dict[Probe, Stat]:
    """`qcompile.calib.sweep.sweep.sweep`, in blocks that read at most `limit` bytes of weights.

    The statistics of a large model (`qcompile.ir.spill.is_large`) are those of `sweep` bit for bit; where the sessions
    optimize, a fusion across a cut may round otherwise.  `on_batch` is called after every chunk.

    Raises:
        as `sweep`; DataError: no room for the activations in the temporary directory.
    """
    if not probes:
        return {}
    wanted = list(dict.fromkeys(probes))
    stats: dict[Probe, Stat] = {p: p.observer.empty() for p in wanted} | {p: s for p, s in (known or {}).items() if p in wanted}
    source = typed(model)
    parts = _parts(source, wanted, limit)
    if mem_limit is not None:
        plan_blocks(source, data, wanted, batch_size(model, data, batch), mem_limit, limit=limit)
    end = len(data) if stop is None else min(stop, len(data))
    size = batch_size(model, data, batch)
    for first, last in segments(start, end, None if on_batch is None else chunk_samples(data.run_size(model.inputs()))):
        tell = _Progress(progress, len(parts), start, first, end)
        stats |= _segment(parts, data, stats, first, last, tell, batch=size, threads=threads, mem_limit=mem_limit)
        if on_batch is not None:
            on_batch(stats, last)
    return stats


def plan_blocks(
    model: Model, data: Dataset, probes: Sequence[Probe], batch: int, mem_limit: int | None = None, *, limit: int
) -> MemoryPlan:
    """The memory of `blocked_sweep`: the sweeps of one block after the other.  Raises as `plan_memory`."""
    source, spool = typed(model), Spool(Path())
    sizes, held = functools.cache(functools.partial(tensor_bytes, source, data)), statistics_bytes(source, probes)
    parts = _parts(source, list(dict.fromkeys(probes)), limit)
    asked = [[*each.probes, *(Probe(name, Keep(spool)) for name in each.block.gives)] for each in parts]
    sweeps = [s for p, wanted in zip(parts, asked, strict=True) for s in tiled(p.model, sizes, wanted, batch, mem_limit, held)]
    return MemoryPlan(tuple(sweeps), batch, len(parts))


@dataclass(frozen=True)
class _Part:
    block: Block
    model: Model
    probes: list[Probe]

    def room(self, mem_limit: int | None, statistics: int) -> int | None:
        """What is left of `mem_limit` beside the statistics of the other blocks."""
        if mem_limit is None:
            return None
        return mem_limit - with_margin(statistics - statistics_bytes(self.model, self.probes))


@dataclass
class _Progress:
    """Samples done over all blocks."""

    tell: Meter | None
    blocks: int
    start: int
    first: int
    end: int
    block: int = 0

    def __call__(self, done: int, of: int) -> None:
        if self.tell is not None:
            before = (self.first - self.start) * self.blocks + self.block * of
            self.tell(before + done, (self.end - self.start) * self.blocks)


def _parts(source: Model, probes: Sequence[Probe], limit: int) -> list[_Part]:
    blocks = cut(source, [tensors_of(p) for p in probes], limit)
    answers = [set(b.answers) for b in blocks]
    return [_part(source, b, [p for p in probes if tensors_of(p) in a]) for b, a in zip(blocks, answers, strict=True)]


def _part(source: Model, block: Block, probes: list[Probe]) -> _Part:
    made = part(source, block)
    keep_masked(made.graph, masked_tensors(source.graph))
    if is_large(source.graph):
        mark_large(made.graph)
    return _Part(block, made, probes)


def _segment(
    parts: Sequence[_Part], data: Dataset, stats: Mapping[Probe, Stat], first: int, last: int, progress: _Progress,
    mem_limit: int | None, **options: Any
) -> dict[Probe, Stat]:  # fmt: skip
    """Samples `first` to `last` through all blocks; their activations are forgotten afterwards."""
    found: dict[Probe, Stat] = {}
    held = sum(statistics_bytes(each.model, each.probes) for each in parts)
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        spools: dict[str, Spool] = {}
        for i, each in enumerate(parts):
            progress.block = i
            source = _stored(data, {n: spools[n] for n in each.block.takes}, each.model) if each.block.takes else data
            last = min(last, source.length) if isinstance(source, _Stored) else last
            new = {name: Spool(Path(folder) / f"{len(spools) + k}.data") for k, name in enumerate(each.block.gives)}
            asked = [*each.probes, *(Probe(name, Keep(spool)) for name, spool in new.items())]
            known = {p: stats[p] for p in each.probes}
            answers = sweep(
                each.model, source, asked, start=first, stop=last, known=known, progress=progress,
                mem_limit=each.room(mem_limit, held), **options
            )  # fmt: skip
            found |= {p: answers[p] for p in each.probes}
            spools |= new
            _drop(spools, parts[i + 1 :])
    return found


def _drop(spools: Mapping[str, Spool], later: Sequence[_Part]) -> None:
    """Give back the disk space of what no later block takes."""
    needed = {name for each in later for name in each.block.takes}
    for name, spool in spools.items():
        if name not in needed:
            spool.path.unlink(missing_ok=True)


# activations on disk ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run's array in a spool: of samples `first` to `first + samples`."""

    first: int
    samples: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(eq=False)
class Spool:
    """An activation over all samples, one array a run, in one file."""

    path: Path
    runs: list[Run] = field(default_factory=list[Run])

    def append(self, array: NDArray[Any], first: int, samples: int) -> None:
        """Raises DataError: no room on the disk."""
        try:
            with self.path.open("ab") as f:
                self.runs.append(Run(first, samples, f.tell(), array.shape, array.dtype))
                f.write(np.ascontiguousarray(array).data if array.size else b"")
        except OSError as e:
            raise DataError(
                f"no room for the activations between the model's blocks in {self.path.parent} ({e.strerror});"
                " set TMPDIR to a place with more space, or give fewer --samples"
            ) from e

    def at(self, sample: int) -> Run:
        """The run that holds a sample."""
        return self.runs[bisect_right(self.runs, sample, key=lambda r: r.first) - 1]

    def read(self, run: Run) -> NDArray[Any]:
        """The array of a run, mapped."""
        if not all(run.shape):
            return np.zeros(run.shape, run.dtype)
        return np.memmap(self.path, run.dtype, "r", run.offset, run.shape)


@dataclass(frozen=True)
class Kept(Stat):
    """Nothing: what was observed lies in the spool."""

    def merge(self, other: Self) -> Self:
        """Nothing and nothing."""
        return self


@dataclass(frozen=True)
class Keep(Observer[Kept]):
    """Write every run's array to a spool."""

    infinities: ClassVar = "allowed"  # of a mask
    spool: Spool

    def empty(self) -> Kept:
        return Kept()

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> Kept:
        self.spool.append(array, first_sample_index, len(array) if samples is None else samples)
        return Kept()

    def nbytes(self, shape: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True)
class _SpoolReader:
    """Reads one run at a time: every sample of a run has the run's key."""

    spools: Mapping[str, Spool]
    runs: Spool
    source: Dataset
    own: frozenset[str]

    def __len__(self) -> int:
        return len(self.source)

    def shape_key(self, i: int) -> object:
        return self.runs.at(i).first

    def read(self, index: Sequence[int]) -> Arrays:
        found = {SAMPLES: np.zeros(len(index), np.int8)}  # other arrays need not begin with the samples
        for name, spool in self.spools.items():
            found[name] = spool.read(spool.at(index[0]))
        if self.own:
            inputs = self.source.reader.read([self.source.index[i] for i in index])
            found |= {name: array for name, array in inputs.items() if name in self.own}
        return found

    def digest(self, index: Sequence[int]) -> bytes:
        return self.source.reader.digest([self.source.index[i] for i in index])


@dataclass(frozen=True, eq=False)
class _Stored(Dataset):
    """The inputs of a later block; not searched for NaN and infinity, which masks hold."""

    @property
    def length(self) -> int:
        """Samples that earlier blocks ran."""
        assert isinstance(self.reader, _SpoolReader)
        runs = self.reader.runs.runs
        return runs[-1].first + runs[-1].samples

    def batches(self, size: int) -> Iterator[Arrays]:
        """One run after the other."""
        start = 0
        while start < len(self.index):
            stop = self._batch_end(start, size)
            yield self.reader.read(self.index[start:stop])
            start = stop


def _stored(data: Dataset, spools: Mapping[str, Spool], model: Model) -> _Stored:
    own = frozenset(i.name for i in model.inputs()) - spools.keys()
    runs = next(iter(spools.values()))
    return _Stored(_SpoolReader(spools, runs, data, own), tuple(range(len(data))), tuple(spools), data.source)
