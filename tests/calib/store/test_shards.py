from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qcompile.calib.observe import Histogram, MinMax, Probe, SecondMoment
from qcompile.calib.observe.chunks import CHUNK
from qcompile.calib.store.shards import DataSpec, ShardTask, merge_shards, run_shard, shard_range, split
from qcompile.calib.store.store import Gathered, Key, Statistics, probe_to_json, to_bytes
from qcompile.calib.sweep import provider
from qcompile.calib.sweep.sweep import sweep
from qcompile.errors import BackendError, DataError, ModelError, UsageError
from qcompile.execute.dask_executor import DaskExecutor
from qcompile.execute.executor import ProcessExecutor
from qcompile.ir.model import Model
from tests.calib.sweep.graphs import transformer

SAMPLES = 3 * CHUNK + 5
PROBES = [Probe("ln", MinMax(-1)), Probe("act", Histogram(64)), Probe("res", SecondMoment())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    transformer().save(path / "m.onnx")
    np.savez(path / "d.npz", ids=np.random.default_rng(0).integers(0, 50, (SAMPLES, 5)))
    return path


def tasks(folder: Path, ranges: list[tuple[int, int]]) -> list[ShardTask]:
    model, spec = Model.load(folder / "m.onnx"), DataSpec(str(folder / "d.npz"))
    key = Key(model.digest(), spec.open(model).fingerprint(), SAMPLES, CHUNK, 8, 0)
    probes = json.dumps([probe_to_json(p) for p in PROBES])
    path, text = str(folder / "m.onnx"), json.dumps(dataclasses.asdict(key))
    return [ShardTask(path, key.model, "g", spec, text, probes, *r, 1) for r in ranges]


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """One undisturbed sweep in this process."""
    model = Model.load(folder / "m.onnx")
    stats = sweep(model, DataSpec(str(folder / "d.npz")).open(model), PROBES, batch=8, threads=1)
    task = tasks(folder, [(0, 1)])[0]
    return to_bytes(Statistics(Key(**json.loads(task.key)), (Gathered("g", ((0, SAMPLES),), stats),)))


def test_tasks_merge_to_the_bytes_of_one_sweep(folder: Path, whole: bytes) -> None:
    cut = split([(0, SAMPLES)], CHUNK, 99)
    assert cut == [(0, 64), (64, 128), (128, 192), (192, 197)]
    results = [run_shard(t) for t in tasks(folder, cut)]
    assert merge_shards(results) == merge_shards([merge_shards(results[2:]), results[1], results[0]]) == whole


def test_a_memory_limit_travels_with_the_task(folder: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes) -> None:
    limits: list[int | None] = []
    monkeypatch.setattr(provider, "block_bytes", lambda model, limit: limits.append(limit))
    parts = [run_shard(dataclasses.replace(t, mem_limit=1 << 28)) for t in tasks(folder, split([(0, SAMPLES)], CHUNK, 2))]
    assert limits == [1 << 28] * len(parts) and merge_shards(parts) == whole


def test_ranges_are_cut_at_chunks() -> None:
    assert split([(0, 640)], 64, 2) == [(0, 320), (320, 640)]
    assert split([(40, 130), (256, 300)], 64, 99) == [(40, 64), (64, 128), (128, 130), (256, 300)]
    assert split([(0, 64), (128, 192)], 64, 1) == [(0, 64), (128, 192)]
    assert split([], 64, 3) == []
    assert [shard_range(i, 3, 300, 64) for i in (1, 2, 3)] == [(0, 64), (64, 192), (192, 300)]
    with pytest.raises(DataError, match="300 samples are 5 chunks of 64, too few for 6 shards"):
        shard_range(1, 6, 300, 64)


def test_workers_check_what_they_find(folder: Path) -> None:
    task = tasks(folder, [(0, 64)])[0]
    with pytest.raises(ModelError, match="a worker finds another model"):
        run_shard(dataclasses.replace(task, digest="0" * 64))
    key = json.dumps(json.loads(task.key) | {"data": "0" * 64})
    with pytest.raises(DataError, match="a worker finds other data"):
        run_shard(dataclasses.replace(task, key=key, data=DataSpec(task.data.spec, cap=SAMPLES)))


def die_once(mark: str) -> int:
    """Kill the own process the first time, as the kernel does when memory runs out."""
    path = Path(mark)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def refuse(text: str) -> str:
    raise DataError(text)


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    pool = ProcessExecutor(2)
    try:
        marks = [str(tmp_path / f"{i}") for i in range(3)]
        told: list[int] = []
        found = dict(pool.results(die_once, marks, on_task=told.append))
        assert sorted(found) == [(0,), (1,), (2,)] and sorted(told) == [0, 1, 2]
        assert os.getpid() not in found.values()
        with pytest.raises(DataError, match="no good"):
            list(pool.results(refuse, ["no good"]))
    finally:
        pool.close()


def test_without_distributed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        BackendError, match=r"--dask needs the package distributed; install it with: pip install 'qcompile\[dask\]'"
    ):
        DaskExecutor("local:2")


@pytest.mark.filterwarnings("default")
def test_a_cluster_survives_its_workers(folder: Path, whole: bytes, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="local:x: give a number of processes"):
        DaskExecutor("local:x")
    cluster = DaskExecutor("local:2")
    try:
        assert cluster.workers == 2
        assert len(list(cluster.results(die_once, [str(tmp_path / "mark")]))) == 1
        told: list[int] = []
        found = list(cluster.results(run_shard, tasks(folder, split([(0, SAMPLES)], CHUNK, 99)), merge_shards, told.append))
        assert [i for i, _ in found] == [(0, 1, 2, 3)] and found[0][1] == whole
        deadline = time.monotonic() + 10  # the cluster tells of finished tasks in its own time
        while len(told) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sorted(told) == [0, 1, 2, 3]
        with pytest.raises(DataError, match="no good"):
            list(cluster.results(refuse, ["no good"]))
    finally:
        cluster.close()


@pytest.mark.filterwarnings("default")
def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("qcompile.execute.dask_executor.CONNECT_SECONDS", 0.5)
    with pytest.raises(BackendError, match=r"no dask scheduler with workers answers at tcp://127\.0\.0\.1:9"):
        DaskExecutor("tcp://127.0.0.1:9")
