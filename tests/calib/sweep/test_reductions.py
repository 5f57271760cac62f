"""In-graph reductions against numpy, and sweeps cut into pieces."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import (
    AbsMax,
    ChannelHistograms,
    Extremes,
    Histogram,
    MinMax,
    Moments,
    MomentsStat,
    Probe,
    Rows,
    RowsStat,
    SecondMoment,
    SecondMomentStat,
    Stat,
)
from qcompile.calib.sweep.instrument import instrument
from qcompile.calib.sweep.sweep import sweep
from qcompile.ir.model import Model
from tests.calib.sweep.graphs import build, cnn, transformer

ALL = [
    MinMax(), MinMax(-1), MinMax(-1, heads=2), AbsMax(-1), Histogram(64), Histogram(), Moments(-1), Moments(),
    SecondMoment(), Rows(6), Extremes(3), ChannelHistograms(-1, 32),
]  # fmt: skip


def held(arrays: dict[str, NDArray[Any]]) -> Dataset:
    n = len(next(iter(arrays.values())))
    return Dataset(ArrayReader(arrays, {k: v.dtype for k, v in arrays.items()}, {}), tuple(range(n)), tuple(arrays), "memory")


def copied(x: NDArray[Any], elem: int = T.FLOAT) -> tuple[Model, Dataset]:
    """y = -(-x), so that y is not an input."""
    nodes = [helper.make_node("Neg", ["x"], ["n"], name="n"), helper.make_node("Neg", ["n"], ["y"], name="y")]
    model = build(nodes, {"x": (elem, ["N", *x.shape[1:]])}, "y", {}, 18, elem)
    return model, held({"x": x})


def equal(a: Stat, b: Stat, rtol: float = 0) -> None:
    left, right = a.to_arrays(), b.to_arrays()
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], rtol=rtol, atol=rtol, err_msg=name)


def wide(n: int = 40) -> NDArray[np.float32]:
    """The range grows from sample to sample, by far more than the bins of a histogram."""
    rng = np.random.default_rng(5)
    return (rng.normal(size=(n, 3, 6)) * 2.0 ** np.arange(-n // 2, n - n // 2)[:, None, None]).astype(np.float32)


CASES: dict[str, NDArray[Any]] = {
    "growing": wide(),
    "falling": wide()[::-1].copy(),
    "zeros": np.zeros((20, 3, 4), np.float32),
    "zeros first": np.concatenate([np.zeros((16, 3, 4)), np.full((9, 3, 4), 0.3)]).astype(np.float32),
    "huge": np.array([[1e30, -3e38, 5.0, 0.1]] * 9 + [[1, 2, 3, 4]] * 9, np.float32),
    "tiny": np.array([[1e-40, -1e-38, 0, 1e-44]] * 9, np.float32),
    "narrow": (1000 + np.random.default_rng(0).random((20, 5)) / 512).astype(np.float32),
    "integers": np.random.default_rng(0).integers(-5, 5, (20, 5)).astype(np.float32),
    "half": np.random.default_rng(0).normal(0, 2e4, (20, 5)).clip(-6e4, 6e4).astype(np.float16),
    "double": np.random.default_rng(0).normal(0, 1e-3, (20, 5)),
}


@pytest.mark.parametrize("bins", [4096, 32])
@pytest.mark.parametrize("name", CASES)
def test_histograms_count_exactly(name: str, bins: int) -> None:
    x = CASES[name]
    elem = {"float16": T.FLOAT16, "float32": T.FLOAT, "float64": T.DOUBLE}[x.dtype.name]
    model, data = copied(x, elem)
    for batch in (1, 4, 64):
        equal(sweep(model, data, [p := Probe("y", Histogram(bins))], batch=batch, threads=1)[p], Histogram(bins).observe(x))


def test_values_that_are_not_negative_are_cut_the_same_way() -> None:
    model = cnn()
    x = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    raw = sweep(model, held({"x": x}), [Probe("a1", Histogram()), Probe("a1", ChannelHistograms(1))], threads=1)
    channels = raw[Probe("a1", ChannelHistograms(1))].channels  # type: ignore[attr-defined]
    whole = raw[Probe("a1", Histogram())]
    merged = channels[0]
    for channel in channels[1:]:
        merged = merged.merge(channel)
    equal(whole, merged)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sums_are_close_to_numpy(dtype: Any) -> None:
    """float32 sums of a batch of 8: 1e-5 relative to the sum of magnitudes."""
    x = np.random.default_rng(1).normal(0.1, 30, (48, 197, 32)).astype(dtype)
    model, data = copied(x, T.FLOAT if dtype is np.float32 else T.FLOAT16)
    probes = [Probe("y", o) for o in (Moments(), Moments(-1), SecondMoment())]
    found = sweep(model, data, probes, batch=8, threads=1)
    flat = x.astype(np.float64).reshape(-1, 32)
    scale = np.abs(flat).sum(0)
    for probe in probes[:2]:
        stat, exact = found[probe], probe.observer.observe(x)
        assert isinstance(stat, MomentsStat)
        assert stat.count == exact.count
        assert np.all(np.abs(stat.sum - exact.sum) <= 1e-5 * scale.sum())
        np.testing.assert_allclose(stat.sumsq, exact.sumsq, rtol=1e-5)
    second = found[probes[2]]
    assert isinstance(second, SecondMomentStat)
    np.testing.assert_allclose(second.xtx, flat.T @ flat, atol=1e-5 * (flat**2).sum(0).max())


def test_masked_second_moment() -> None:
    ids = np.random.default_rng(0).integers(0, 50, (11, 5))
    nodes_model = transformer()
    mask = (np.random.default_rng(1).random((11, 5)) < 0.7).astype(np.int64)
    value = ir.Value(name="mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N", 5]))
    nodes_model.graph.inputs.append(value)
    data = held({"ids": ids, "mask": mask})
    probes = [Probe("res", SecondMoment("mask")), Probe("res", SecondMoment())]
    masked, plain = sweep(nodes_model, data, probes, batch=4, threads=1).values()
    assert isinstance(masked, SecondMomentStat) and isinstance(plain, SecondMomentStat)
    assert (masked.count, plain.count) == (mask.sum(), 55)
    kept = sweep(nodes_model, data, [Probe("res", Rows(55))], threads=1)[Probe("res", Rows(55))]
    assert isinstance(kept, RowsStat)
    used = mask[kept.ids[:, 0], kept.ids[:, 1]] > 0
    rows = kept.rows[used].astype(np.float64)
    np.testing.assert_allclose(masked.xtx, rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuts", [[64], [64, 128], [128]])
def test_shards_give_the_same_bits(cuts: list[int]) -> None:
    model, data = copied(np.random.default_rng(0).normal(size=(150, 3, 4)).astype(np.float32))
    probes = [Probe("y", o) for o in ALL]
    whole = sweep(model, data, probes, threads=1)
    ends = [0, *cuts, 150]
    shards = [sweep(model, data, probes, threads=1, start=a, stop=b) for a, b in pairwise(ends)]
    for probe in probes:
        merged = shards[-1][probe]
        for shard in reversed(shards[:-1]):
            merged = shard[probe].merge(merged)
        equal(merged.folded(2), whole[probe].folded(2))


@pytest.mark.parametrize("stop", [8, 64, 72, 136])
def test_a_resumed_sweep_gives_the_same_bits(stop: int) -> None:
    model, data = copied(np.random.default_rng(0).normal(size=(150, 3, 4)).astype(np.float32))
    probes = [Probe("y", o) for o in ALL]
    seen: list[tuple[dict[Probe, Stat], int]] = []
    whole = sweep(model, data, probes, threads=1, on_batch=lambda stats, done: seen.append((dict(stats), done)))
    assert [done for _, done in seen][-1] == 150
    known = next(stats for stats, done in seen if done == stop)
    resumed = sweep(model, data, probes, threads=1, start=stop, known=known)
    for probe in probes:
        equal(resumed[probe], whole[probe])


@pytest.mark.parametrize("batch", [3, 50])
def test_fixed_batches_lose_only_the_last_rest(batch: int) -> None:
    model = cnn(batch=batch)
    data = held({"x": np.zeros((160, 3, 8, 8), np.float32)})
    stat = sweep(model, data, [p := Probe("c1", Moments())], threads=1)[p]
    assert isinstance(stat, MomentsStat)
    assert stat.count == 160 // batch * batch * 4 * 64


def test_tiled_sweeps_give_the_same_bits() -> None:
    from qcompile.calib.sweep import memory

    model = transformer()
    data = held({"ids": np.random.default_rng(0).integers(0, 50, (150, 5))})
    probes = [Probe(t, o) for t in ("ln", "res", "act") for o in ALL]
    whole = sweep(model, data, probes, threads=1)
    least = memory.plan_memory(model, data, probes[: len(ALL)], 8).predicted_bytes
    limit = max(
        memory.plan_memory(model, data, [p for p in probes if p.tensor == t], 8).predicted_bytes for t in ("ln", "res", "act")
    )
    limit += memory.with_margin(memory.statistics_bytes(model, probes))
    assert limit >= least
    assert len(memory.plan_memory(model, data, probes, 8, limit).sweeps) > 1
    calls: list[tuple[int, int]] = []
    tiled = sweep(model, data, probes, threads=1, mem_limit=limit, progress=lambda done, of: calls.append((done, of)))
    for probe in probes:
        equal(tiled[probe], whole[probe])
    assert calls[-1][0] == calls[-1][1] and len({of for _, of in calls}) == 1
    seen: list[int] = []
    again = sweep(model, data, probes, threads=1, mem_limit=limit, on_batch=lambda _, done: seen.append(done))
    assert seen == [150]
    for probe in probes:
        equal(again[probe], whole[probe])


def test_reductions_stand_right_behind_what_they_reduce() -> None:
    """ONNX Runtime takes minutes to order a graph of ten thousand nodes with thousands of reductions at its end."""
    made = instrument(transformer(), [Probe(t, MinMax(-1)) for t in ("ln", "act", "res")])
    nodes = list(made.model.graph)
    place = {v: i for i, node in enumerate(nodes) for v in node.outputs}
    appended = [(i, place[v]) for i, n in enumerate(nodes) if str(n.name).startswith("qcompile_") and (v := n.inputs[0]) in place]
    assert len(appended) >= 6
    assert all(reduced - made_at <= 3 for reduced, made_at in appended)
