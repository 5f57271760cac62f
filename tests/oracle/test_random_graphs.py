"""Random float graphs through the integer target: oracle == ONNX Runtime bit for bit, or a refusal with a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.errors import QcompileError
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.target.rules import check
from tests.oracle.build import on_ort, on_reference
from tests.oracle.random_floats import random_model

OPEN = (
    "open findings in the lowering: int64 comparisons beyond 2^31 in norms (QC-INT-012), a zero scale at an output (QC-INT-016)"
)
FEW, MANY = 40, 500
REFUSED_AT_MOST = 0.15  # of the graphs: a generator that is mostly refused proves nothing


def outcome(seed: int, folder: Path) -> str:
    """What became of one random graph: "equal", or the refusal's message; anything else fails."""
    model, data, wider = random_model(seed)
    source, target = folder / "float.onnx", folder / "integer.onnx"
    onnx.save(model, source)
    np.savez(folder / "calib.npz", **data)  # pyright: ignore[reportArgumentType]
    target.unlink(missing_ok=True)
    try:
        qcompile.compile(source, output=target, target="integer", calib=str(folder / "calib.npz"), verify="off", threads=1)
    except QcompileError as refusal:
        assert len(str(refusal)) > 20 and type(refusal) is not QcompileError
        return str(refusal)
    _require_conformance(onnx.load(target), {**wider})
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


def outcomes(seeds: range, folder: Path) -> Counter[str]:
    found = Counter[str]()
    for seed in seeds:
        try:
            found["equal" if outcome(seed, folder) == "equal" else "refused"] += 1
        except AssertionError as error:
            raise AssertionError(f"random graph {seed}: {error}") from error
    return found


@pytest.mark.xfail(reason=OPEN)
def test_random_graphs_are_bit_exact_or_refused(tmp_path: Path) -> None:
    found = outcomes(range(FEW), tmp_path)
    assert found["refused"] <= REFUSED_AT_MOST * FEW


@pytest.mark.slow
@pytest.mark.xfail(reason=OPEN)
def test_500_random_graphs_are_bit_exact_or_refused(tmp_path: Path) -> None:
    found = outcomes(range(FEW, FEW + MANY), tmp_path)
    assert sum(found.values()) == MANY and found["refused"] <= REFUSED_AT_MOST * MANY
