"""Random float graphs through the integer target: oracle == ONNX Runtime bit for bit, or a refusal with a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.errors import ModelError
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.target.check import check
from tests.oracle.build import on_ort, on_reference
from tests.oracle.random_floats import Case, Graph, random_model

FEW, MANY = 100, 500
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
REFUSED_AT_MOST = 0.1  # of the graphs: a generator that is mostly refused proves nothing


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random model: its structure drawn by hypothesis, its weights from a drawn seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_model(Graph(rng, lambda n: draw(st.integers(0, n - 1))))


def outcome(case: Case, folder: Path) -> str:
    """What became of one random graph: "equal", or the refusal's message; anything else fails."""
    source, target = folder / "float.onnx", folder / "integer.onnx"
    onnx.save(case.model, source)
    np.savez(folder / "calib.npz", **case.data)  # pyright: ignore[reportArgumentType]
    target.unlink(missing_ok=True)
    try:
        qcompile.compile(source, output=target, target="integer", calib=str(folder / "calib.npz"), verify="off", threads=1)
    except ModelError as refusal:
        assert "; " in str(refusal), "a refusal ends with what to do"
        return str(refusal)
    _require_conformance(onnx.load(target), case.wider)
    return "equal"


def _require_conformance(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    errors = [f.to_json() for f in check(model, "integer") if f.severity == "error"]
    assert not errors, f"{len(errors)} errors, first {errors[0]}"
    assert prove(model).complete
    graph = integer_graph(model)
    ours = list(decode(graph, run_integer(graph, encode(graph, feeds))).values())
    runs = {"off": on_ort(model, feeds, "off", 1), "all": on_ort(model, feeds, "all", 2)}
    if all(n.op_type != "MaxPool" for n in model.graph.node):  # onnx.reference pads int8 with NaN
        runs["reference"] = on_reference(model, feeds)
    for name, theirs in runs.items():
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b), f"{name}: {np.sum(a != b)} of {a.size} elements differ"


def outcomes(count: int, folder: Path) -> Counter[str]:
    """How many of `count` graphs are equal, and how many are refused."""
    found = Counter[str]()

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)
    @given(cases())
    def explore(case: Case) -> None:
        result = outcome(case, folder)
        found["equal" if result == "equal" else "refused"] += 1

    explore()
    return found


def test_random_graphs_are_bit_exact_or_refused(tmp_path: Path) -> None:
    found = outcomes(FEW, tmp_path)
    assert sum(found.values()) >= FEW and found["refused"] <= REFUSED_AT_MOST * FEW


@pytest.mark.slow
def test_500_random_graphs_are_bit_exact_or_refused(tmp_path: Path) -> None:
    found = outcomes(MANY, tmp_path)
    assert sum(found.values()) >= MANY and found["refused"] <= REFUSED_AT_MOST * MANY
