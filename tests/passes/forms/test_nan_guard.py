"""The NaN guard behind a softmax goes where no row can be NaN, and stays where one can."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from tests.passes.models import built
from tests.passes.running import context, run_passes

node = helper.make_node
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
    Canonicalize().apply(model, context("rtx"))
    assert "IsNaN" in {n.op_type for n in model.graph}


@pytest.mark.parametrize(
    ("mask", "op", "axis"),
    [
        (np.vstack([np.full((1, LENGTH), -INF), np.zeros((LENGTH - 1, LENGTH), np.float32)]), "Add", -1),  # a row without a key
        (-INF, "Add", -1),
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
