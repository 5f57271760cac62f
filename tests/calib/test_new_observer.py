"""A new observer is one class: swept, planned, stored, merged and read back by what the class says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper

from qcompile.calib.observe import CHUNK, MinMax, Observer, Probe, Reduction, Seen, Stat, Told
from qcompile.calib.store.merge import merge
from qcompile.calib.store.store import Gathered, Key, Statistics, from_bytes, to_bytes
from qcompile.calib.sweep.blocks import blocked_sweep
from qcompile.calib.sweep.memory import plan_memory, statistics_bytes
from qcompile.calib.sweep.sweep import Sweep, sweep
from qcompile.errors import DataError
from qcompile.ir.model import Model
from tests.calib.sweep.graphs import build
from tests.calib.sweep.test_reductions import held

SAMPLES = 2 * CHUNK
KEY = Key("m", "d", SAMPLES, CHUNK, 8, 0)


@dataclass(frozen=True, eq=False)
class ReachStat(Stat):
    """The largest L1 length of a row, and of its first `of` values alone; float64 of shape []."""

    of: int
    longest: NDArray[np.float64]

    def merge(self, other: Self) -> Self:
        return replace(self, longest=np.maximum(self.longest, other.longest))


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """Known to files only as long as the test runs."""
    monkeypatch.setattr(Observer, "kinds", dict(Observer.kinds))

    @dataclass(frozen=True)
    class Reach(Observer[ReachStat]):
        kind: ClassVar[str] = "reach"
        scale: int = 1
        inside: bool = True

        def empty(self) -> ReachStat:
            return ReachStat(self.scale, np.asarray(0.0))

        def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> ReachStat:
            return self._of(np.abs(array).sum(-1))

        def in_graph(self, rank: int) -> Reduction | None:
            return Reduction(("ReduceL1",), (rank - 1,), sums=True) if self.inside else None

        def from_batch(self, seen: Seen) -> ReachStat:
            return self._of(seen.arrays[0]) if seen.reduced else self.observe(seen.arrays[0])

        def nbytes(self, shape: Sequence[int]) -> int:
            return 1000 + shape[-1]

        def _of(self, rows: NDArray[Any]) -> ReachStat:
            return replace(self.empty(), longest=np.asarray(self.scale * rows.max(initial=0.0), np.float64))

    return Reach


@pytest.fixture
def model() -> Model:
    nodes = [helper.make_node("Neg", ["x"], ["n"], name="n"), helper.make_node("Exp", ["n"], ["y"], name="y")]
    return build(nodes, {"x": (T.FLOAT, ["N", 3, 4])}, "y", {}, 18)


X = np.random.default_rng(0).normal(size=(SAMPLES, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("inside", [True, False])
def test_it_is_swept(reach: type[Any], model: Model, inside: bool) -> None:
    probes = [Probe("n", reach(inside=inside)), Probe("n", MinMax())]
    told = Told(sweep(model, held({"x": X}), probes, batch=8, threads=1))
    assert told[probes[0]].longest == pytest.approx(np.abs(X).sum(-1).max())
    assert dict(told.of(reach)) == {"n": told[probes[0]]}
    ran = Sweep(model, held({"x": X}), probes).plan
    assert ("n" in ran.raw) and any(n.op_type == "ReduceL1" for n in ran.model.graph) == inside
    assert blocked_sweep(model, held({"x": X}), probes, limit=1, batch=8)[probes[0]].to_arrays() == told[probes[0]].to_arrays()


def test_infinities_are_named_for_it(reach: type[Any], model: Model) -> None:
    x = X.copy()
    x[9, 0, 0] = -200
    for inside in (True, False):
        with pytest.raises(DataError, match=r"'y', made by node 'y' .*infinite values from sample 9 on"):
            sweep(model, held({"x": x}), [Probe("y", reach(inside=inside))], batch=1, threads=1)


def test_its_memory_is_planned(reach: type[Any], model: Model) -> None:
    data = held({"x": X})
    assert statistics_bytes(model, [Probe("n", reach())]) == 1004
    inside, outside = (plan_memory(model, data, [Probe("n", reach(inside=i))], 1024).predicted_bytes for i in (True, False))
    assert inside < outside


def test_it_goes_into_a_file_and_back(reach: type[Any], model: Model) -> None:
    data, probe = held({"x": X}), Probe("n", reach(scale=3))
    spans = ((0, CHUNK), (CHUNK, SAMPLES))
    parts = [
        Statistics(KEY, (Gathered("g", (span,), sweep(model, data, [probe], start=span[0], stop=span[1])),)) for span in spans
    ]
    whole = Statistics(KEY, (Gathered("g", ((0, SAMPLES),), sweep(model, data, [probe])),))
    assert to_bytes(merge([("a", parts[1]), ("b", from_bytes(to_bytes(parts[0])))])) == to_bytes(whole)
    read = Told(from_bytes(to_bytes(whole)).sweeps[0].stats)
    assert read[probe].of == 3 and read[probe].longest == Told(whole.sweeps[0].stats)[probe].longest


def test_two_of_one_name_are_refused(reach: type[Any]) -> None:
    with pytest.raises(TypeError, match="two observers are called 'reach'"):
        type("Other", (reach,), {"kind": "reach"})
