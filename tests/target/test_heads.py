"""Which layers are heads: YOLO with its DFL, SSD, boxes that move anchors, selections inside the graph; and what is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from qcompile.target.heads import final_heads
from qcompile.target.target import Choices
from tests.passes.models import built
from tests.passes.running import context

node = helper.make_node


def random(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * 0.2).astype(np.float32)


STEM = [
    node("Conv", ["x", "stem_w"], ["stem"], name="stem", pads=[1] * 4),
    node("Conv", ["stem", "small_w"], ["small"], name="small", pads=[1] * 4, strides=[2, 2]),
]
ROWS = {f"{scale}_rows": [node("Reshape", [f"{scale}_cat", "rows"], [f"{scale}_rows"])] for scale in ("a", "b")}


def convs(*names: str) -> list[Any]:
    """1x1 layers NAME on `stem` (a...) and `small` (b...); coordinates have 4 x 8 channels, scores 3."""
    return [node("Conv", ["stem" if n[0] == "a" else "small", f"{n}_w"], [n], name=n) for n in names]


YOLO = [
    *convs("a_box", "a_score", "b_box", "b_score"),
    node("Concat", ["a_box", "a_score"], ["a_cat"], axis=1),
    node("Concat", ["b_box", "b_score"], ["b_cat"], axis=1),
    *ROWS["a_rows"], *ROWS["b_rows"],
    node("Concat", ["a_rows", "b_rows"], ["all"], axis=2),
    node("Split", ["all", "parts"], ["sides", "logits"], axis=1),
    node("Reshape", ["sides", "bins"], ["binned"]),
    node("Transpose", ["binned"], ["turned"], perm=[0, 2, 1, 3]),
    node("Softmax", ["turned"], ["shares"], axis=1),
    node("Conv", ["shares", "dfl_w"], ["mean"], name="dfl"),
    node("Reshape", ["mean", "four"], ["far"]),
    node("Split", ["far", "halves"], ["low", "high"], axis=1),
    node("Sub", ["anchors", "low"], ["x1"]),
    node("Add", ["anchors", "high"], ["x2"]),
    node("Sub", ["x2", "x1"], ["size"]),
    node("Sigmoid", ["logits"], ["scores"]),
    node("Concat", ["x1", "size", "scores"], ["y"], axis=1),
]  # fmt: skip
CHOSEN = [
    *convs("a_score", "b_score"),
    node("Reshape", ["a_score", "rows"], ["a_rows"]),
    node("Reshape", ["b_score", "rows"], ["b_rows"]),
    node("Concat", ["a_rows", "b_rows"], ["all"], axis=2),
    node("Sigmoid", ["all"], ["scores"]),
    node("ReduceMax", ["scores", "first"], ["best"], keepdims=0),
    node("TopK", ["best", "k"], ["values", "y"], axis=1),
]
MOVED = [
    node("GlobalAveragePool", ["stem"], ["pooled"]),
    *convs("a_score"),
    node("Reshape", ["a_score", "rows"], ["flat"]),
    node("MatMul", ["flat", "point_w"], ["delta"], name="points"),
    node("Split", ["stem", "eights"], ["left", "right"], axis=1),
    node("Reshape", ["left", "rows8"], ["reference"]),
    node("ReduceMean", ["reference", "first"], ["where"], keepdims=1),
    node("Add", ["delta", "where"], ["sum"]),
    node("Sigmoid", ["sum"], ["y"]),
]
STREAM = [*convs("a_wide"), node("Add", ["a_wide", "stem_wide"], ["sum"]), node("Relu", ["sum"], ["y"])]
CONSTANTS = {
    "stem_w": random(16, 4, 3, 3), "small_w": random(16, 16, 3, 3), "a_box_w": random(32, 16, 1, 1), "b_box_w": random(32, 16, 1, 1),
    "a_score_w": random(3, 16, 1, 1), "b_score_w": random(3, 16, 1, 1), "a_wide_w": random(32, 16, 1, 1), "wide_w": random(32, 16, 1, 1),
    "dfl_w": np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1), "anchors": random(1, 2, 80), "point_w": random(64, 4),
    "rows": np.array([1, -1, 64]), "rows8": np.array([1, 8, 64]), "parts": np.array([32, 3]), "bins": np.array([1, 4, 8, 80]),
    "four": np.array([1, 4, 80]), "halves": np.array([2, 2]), "first": np.array([1]), "k": np.array([5]), "eights": np.array([8, 8]),
}  # fmt: skip


def names(tail: Sequence[Any]) -> set[str]:
    used = {i for n in tail for i in n.input}
    wide = [node("Conv", ["stem", "wide_w"], ["stem_wide"], name="wide")] if "stem_wide" in used else []
    small = STEM if any(i == "small" for i in used) else STEM[:1]
    scaled = [node("Reshape", n.input[:1] + ["rows16"], n.output) if n.output[0] == "b_rows" else n for n in tail]
    made = built([*small, *wide, *scaled], [1, 4, 8, 8], CONSTANTS | {"rows16": np.array([1, -1, 16])})
    Canonicalize().apply(made, context())
    return {str(n.name) for n in final_heads(made.graph)}


@pytest.mark.parametrize(
    ("tail", "heads"),
    [
        (YOLO, {"a_box", "a_score", "b_box", "b_score", "dfl"}),
        (CHOSEN, {"a_score", "b_score"}),
        (MOVED, {"points"}),
        (STREAM, set[str]()),
    ],
    ids=["yolo", "selected inside", "points moved by a stream", "a residual stream"],
)
def test_what_leads_to_the_outputs(tail: Sequence[Any], heads: set[str]) -> None:
    assert names(tail) == heads
