"""Shards: ranges of samples as tasks that any process on any machine can do, from names and numbers alone.

A task names the model's file and the data; nothing but strings and numbers travels to a worker, and statistics in the
format of `qcompile.calib.store.store` come back.  Workers on other machines need the same paths (a shared folder).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.calib.data import Dataset, load_data
from qcompile.calib.data.dataset import HELD_BACK
from qcompile.calib.store.merge import merge
from qcompile.calib.store.store import Gathered, Key, Range, Statistics, from_bytes, probe_from_json, to_bytes
from qcompile.calib.sweep.alone import suited
from qcompile.calib.sweep.provider import Sweeps
from qcompile.errors import DataError, ModelError
from qcompile.execute.session import use_libraries
from qcompile.ir.model import Model


@dataclass(frozen=True)
class DataSpec:
    """How to open data to fit to (see `qcompile.calib.data.sources.load_data`); without `samples` at most `cap` are taken."""

    spec: str
    preprocess: str | None = None
    samples: int | None = None
    cap: int | None = None
    seed: int = 0

    def open(self, model: Model) -> Dataset:
        """The data, checked against the model's inputs, and taken apart where the model takes no two samples at a time.

        Some samples are held back (`Dataset.fitted`).
        """
        inputs = model.inputs()
        data = suited(load_data(self.spec, inputs, self.preprocess, self.samples, self.seed, spare=HELD_BACK), model)
        return data.fitted(self.samples or self.cap or len(data), data.run_size(inputs) or 1)


@dataclass(frozen=True)
class ShardTask:
    """Samples `start` to `stop` of `data` through the model at `path`, whose digest must be `digest`.

    `probes` and `versions` are JSON; `graph` is what the statistics are filed under; `libraries` are those of custom operators.
    """

    path: str
    digest: str
    graph: str
    data: DataSpec
    key: str
    probes: str
    start: int
    stop: int
    threads: int | None = None
    mem_limit: int | None = None
    libraries: tuple[str, ...] = ()


def run_shard(task: ShardTask) -> bytes:
    """The statistics of one task, as a file's contents.

    Raises:
        ModelError, DataError: this machine finds another model or other data under these names.
    """
    use_libraries(task.libraries)
    model, key = _model(task.path, task.digest), _key(task.key)
    data = _data(task.data, task.path, task.digest, key.data)
    probes = [probe_from_json(p) for p in json.loads(task.probes)]
    found = Sweeps(data, task.threads, key.batch, mem_limit=task.mem_limit).part(model, probes, task.start, task.stop)
    return to_bytes(Statistics(key, (Gathered(task.graph, ((task.start, task.stop),), found),)))


def merge_shards(parts: Sequence[bytes]) -> bytes:
    """Statistics of disjoint samples as one."""
    return to_bytes(merge([("a shard", from_bytes(p)) for p in parts]))


def split(ranges: Sequence[Range], length: int, pieces: int) -> list[Range]:
    """`ranges` cut at multiples of `length` into at most about `pieces` ranges of equal size."""
    chunks = [c for r in ranges for c in _chunks(r, length)]
    each = max(1, -(-len(chunks) // max(1, pieces)))
    groups, current = list[Range](), list[Range]()
    for chunk in chunks:
        if current and (len(current) == each or current[-1][1] != chunk[0]):
            groups.append((current[0][0], current[-1][1]))
            current = []
        current.append(chunk)
    return [*groups, (current[0][0], current[-1][1])] if current else groups


def shard_range(index: int, count: int, samples: int, length: int) -> Range:
    """Whole chunks of `length` samples for shard `index` (from 1) of `count`.

    Raises:
        DataError: there are fewer chunks than shards.
    """
    chunks = -(-samples // length)
    if chunks < count:
        raise DataError(
            f"{samples} samples are {chunks} chunks of {length}, too few for {count} shards; give more --samples or fewer shards"
        )
    low, high = ((i * chunks // count) * length for i in (index - 1, index))
    return low, min(high, samples)


def _chunks(r: Range, length: int) -> list[Range]:
    cuts = [r[0], *range((r[0] // length + 1) * length, r[1], length), r[1]]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


@functools.lru_cache(maxsize=1)
def _model(path: str, digest: str) -> Model:
    model = Model.load(path)
    if model.digest() != digest:
        raise ModelError(f"a worker finds another model at {path}; give all workers the same files")
    return model


@functools.lru_cache(maxsize=1)
def _data(spec: DataSpec, path: str, digest: str, fingerprint: str) -> Dataset:
    data = spec.open(_model(path, digest))
    if data.fingerprint() != fingerprint:
        raise DataError(f"a worker finds other data at {spec.spec}; give all workers the same files")
    return data


def _key(text: str) -> Key:
    return Key(**json.loads(text))
