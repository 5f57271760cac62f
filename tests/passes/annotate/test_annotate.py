"""What annotate leaves in float because of what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompile.decide.decisions import decisions
from qcompile.errors import DataError
from qcompile.pipeline import registry
from tests.passes.models import built
from tests.passes.running import context, run_passes

node = helper.make_node


def test_a_layer_that_no_sample_reaches_stays_in_float() -> None:
    """Rows above a threshold that none exceeds: the product has no rows, its neighbour is quantized."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, 8)).astype(np.float32) for n in ("w", "v")}
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="reached"),
        node("ReduceMax", ["a", "axis"], ["top"], keepdims=0),
        node("Greater", ["top", "limit"], ["large"]),
        node("Compress", ["a", "large"], ["rows"], axis=0),
        node("MatMul", ["rows", "v"], ["b"], name="empty"),
        node("ReduceSum", ["b", "first"], ["s"], keepdims=1),
        node("Add", ["a", "s"], ["y"]),
    ]
    constants = weights | {"axis": np.array([1]), "first": np.array([0]), "limit": np.float32(1e9)}
    model = built(nodes, ["N", 8], constants, opset=18)
    for target in ("ort", "trt"):
        passes = registry.parse("canonicalize,annotate{range=mse}")
        ctx = context(target, quantize=("reached", "empty"))
        after, reports = run_passes(model, passes, {"x": rng.standard_normal((9, 8)).astype(np.float32)}, ctx)
        assert {str(use.node.name) for use in decisions(after.graph)} == {"reached"}
        assert any(r.node == "empty" and "no calibration sample puts a value into rows" in r.reason for r in reports[-1].remarks)


def test_where_nothing_may_stay_in_float_an_empty_tensor_is_refused() -> None:
    model = built([node("MatMul", ["x", "w"], ["y"])], ["N", "rows", 8], {"w": np.ones((8, 8), np.float32)}, opset=18)
    with pytest.raises(DataError, match="puts a value into 'x', and integer keeps nothing in float; give samples that fill it"):
        run_passes(model, registry.parse("canonicalize,annotate"), {"x": np.zeros((4, 0, 8), np.float32)}, context("integer"))
