"""The NaN guard behind a softmax goes where no row can be NaN, and stays where one can."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from tests.passes.forms.apart import answers
from tests.passes.models import built
from tests.passes.running import context, run_passes

node = helper.make_node
info = helper.make_tensor_value_info
LENGTH = 8
INF = np.float32(np.inf)


def causal(low: float) -> np.ndarray:
    return np.triu(np.full((LENGTH, LENGTH), low, np.float32), 1)


def guarded(mask: np.ndarray | str, op: str = "Add", axis: int = -1) -> Model:
    """softmax(x x^T * 0.5 + mask) x, guarded; `mask` may name a tensor that is computed."""
    constants = {"half": np.float32(0.5), "zero": np.float32(0)} | ({} if isinstance(mask, str) else {"mask": mask})
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        node("MatMul", ["x", "xt"], ["s"]),
        node("Mul", ["s", "half"], ["scaled"]),
        node("Log", ["s"], ["logs"]),
        node(op, ["scaled", "logs" if isinstance(mask, str) else "mask"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=axis),
        node("IsNaN", ["p"], ["nan"]),
        node("Where", ["nan", "zero", "p"], ["guarded"]),
        node("MatMul", ["guarded", "x"], ["y"]),
    ]
    return built([n for n in nodes if isinstance(mask, str) or n.op_type != "Log"], ["N", LENGTH, 16], constants)


def operators(model: Model) -> set[str]:
    x = np.random.default_rng(0).standard_normal((4, LENGTH, 16)).astype(np.float32)
    after, _ = run_passes(model, [Canonicalize()], {"x": x}, context("rtx"))
    return {n.op_type for n in after.graph}


@pytest.mark.parametrize(
    ("mask", "op"),
    [(causal(-1e4), "Add"), (causal(-np.inf), "Add"), (np.float32(2), "Div"), (causal(-1), "Sub")],
)
def test_a_guard_that_does_nothing_goes(mask: np.ndarray, op: str) -> None:
    assert not operators(guarded(mask, op)) & {"IsNaN", "Where"}


def test_the_lowest_number_added_twice_is_infinite() -> None:
    lowest = float(np.finfo(np.float32).min)
    assert not operators(guarded(causal(lowest))) & {"IsNaN"}
    model = guarded(causal(lowest))
    scaled = next(n for n in model.graph if n.op_type == "Mul")
    scaled.op_type = "Add"
    scaled.replace_input_with(1, model.graph.initializers["mask"])
    Canonicalize().apply(model, context("ort"))
    assert "IsNaN" in {n.op_type for n in model.graph}


def test_a_constant_mask_that_empties_a_row_moves_the_guard() -> None:
    mask = np.vstack([np.full((1, LENGTH), -INF), np.zeros((LENGTH - 1, LENGTH), np.float32)])
    assert "Where" in operators(guarded(mask)) and "IsNaN" not in operators(guarded(mask))


@pytest.mark.parametrize(
    ("mask", "op", "axis"),
    [
        (-INF, "Add", -1),  # of no axis
        (causal(np.inf), "Add", -1),
        (causal(-np.inf), "Add", 1),  # the softmax runs over queries
        (np.float32(0), "Div", -1),
        ("computed", "Add", -1),
    ],
)
def test_a_guard_that_may_be_needed_stays(mask: np.ndarray | str, op: str, axis: int) -> None:
    model = guarded(mask, op, axis)
    Canonicalize().apply(model, context("rtx"))
    assert {n.op_type for n in model.graph} >= {"IsNaN", "Where"}


BOOL, FLOAT = TensorProto.BOOL, TensorProto.FLOAT
ROWS = np.random.default_rng(2).integers(0, 2, (4, LENGTH, LENGTH)).astype(bool)
ROWS[:, 0] = False
ROWS[:, 1, 0] = True
ADDED = np.where(ROWS, np.float32(0), -INF)


def masked(kind: str) -> Model:
    """softmax(x x^T + mask) x, guarded; the mask m is an input: bool or float, chosen from by Where or added, once or twice."""
    steps = {
        "bool": [node("Where", ["m", "s", "low"], ["masked"])],
        "float": [node("Add", ["s", "m"], ["masked"])],
        "both": [node("Where", ["m", "zero", "low"], ["f"]), node("Add", ["s", "f"], ["masked"])],
        "finite": [node("Where", ["m", "zero", "lowest"], ["f"]), node("Add", ["s", "f"], ["masked"])],
        "twice": [node("Add", ["s", "causal"], ["c"]), node("Add", ["c", "m"], ["masked"])],
    }[kind]
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        node("MatMul", ["x", "xt"], ["s"]),
        *steps,
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("IsNaN", ["p"], ["nan"]),
        node("Where", ["nan", "zero", "p"], ["guarded"]),
        node("MatMul", ["guarded", "x"], ["y"]),
    ]
    numbers = {"zero": 0.0, "low": -np.inf, "lowest": np.finfo(np.float32).min, "causal": causal(-np.inf)}
    stored = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in numbers.items()]
    mask = info("m", FLOAT if kind in ("float", "twice") else BOOL, ["N", LENGTH, LENGTH])
    ends = [info(n, FLOAT, ["N", LENGTH, 16]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", [ends[0], mask], ends[1:], stored)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("kind", ["bool", "float", "both", "twice"])
def test_a_guard_under_a_mask_that_is_an_input_moves_behind_the_product(kind: str) -> None:
    """Rows without a key are 0 as before, and nothing is NaN on the way."""
    model = masked(kind)
    x = np.random.default_rng(0).standard_normal((4, LENGTH, 16)).astype(np.float32)
    feeds = {"x": x, "m": ADDED if kind in ("float", "twice") else ROWS}
    after, ctx = model.clone(), context("rtx")
    Canonicalize().apply(after, ctx)
    assert any("NaN guard moved" in r.reason for r in ctx.remarks.all)
    assert "IsNaN" not in {n.op_type for n in after.graph}
    shown = next(n for n in after.graph if n.op_type == "Softmax").outputs[0]
    after.graph.outputs.append(shown)
    (want,), (got, p) = answers(model, feeds), answers(after, feeds)
    assert np.array_equal(want == 0, got == 0) and np.allclose(want, got, atol=1e-6)
    assert np.isfinite(p).all() and not got[:, 0].any()


def test_a_mask_of_finite_numbers_needs_no_guard() -> None:
    after = masked("finite")
    Canonicalize().apply(after, context("rtx"))
    assert [n.op_type for n in after.graph].count("Where") == 1


def test_the_guard_stays_where_attention_stays_in_float() -> None:
    after = masked("float")
    Canonicalize().apply(after, context("ort"))
    assert "IsNaN" in {n.op_type for n in after.graph}
