"""Which layers are heads: YOLO with its DFL, SSD, boxes that move anchors, selections inside the graph; and what is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.ir.model import Model
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
    node("Conv", ["stem", "small_w"], ["small"], name="small", pads=[3] * 4, strides=[2, 2]),
]


def convs(*names: str) -> list[Any]:
    """1x1 layers NAME on `stem` (a...) and `small` (b...); coordinates have 4 x 8 channels, scores 3."""
    return [node("Conv", ["stem" if n[0] == "a" else "small", f"{n}_w"], [n], name=n) for n in names]


YOLO = [
    *convs("a_box", "a_score", "b_box", "b_score"),
    node("Concat", ["a_box", "a_score"], ["a_cat"], axis=1),
    node("Concat", ["b_box", "b_score"], ["b_cat"], axis=1),
    node("Reshape", ["a_cat", "rows"], ["a_rows"]),
    node("Reshape", ["b_cat", "rows16"], ["b_rows"]),
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
]
CHOSEN = [
    *convs("a_score", "b_score"),
    node("Reshape", ["a_score", "rows"], ["a_rows"]),
    node("Reshape", ["b_score", "rows16"], ["b_rows"]),
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
    "stem_w": random(16, 4, 3, 3),
    "small_w": random(16, 16, 7, 7),
    **{f"{scale}_box_w": random(32, 16, 1, 1) for scale in "ab"},
    **{f"{scale}_score_w": random(3, 16, 1, 1) for scale in "ab"},
    **{name: random(32, 16, 1, 1) for name in ("a_wide_w", "wide_w")},
    "dfl_w": np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1),
    "anchors": random(1, 2, 80),
    "point_w": random(64, 4),
    "rows": np.array([1, -1, 64]),
    "rows16": np.array([1, -1, 16]),
    "rows8": np.array([1, 8, 64]),
    "parts": np.array([32, 3]),
    "bins": np.array([1, 4, 8, 80]),
    "four": np.array([1, 4, 80]),
    "halves": np.array([2, 2]),
    "eights": np.array([8, 8]),
    "first": np.array([1]),
    "k": np.array([5]),
}


def assembled(tail: Sequence[Any]) -> Model:
    """The tail on as much of the stem as it reads, canonical."""
    used = {i for n in tail for i in n.input}
    wide = [node("Conv", ["stem", "wide_w"], ["stem_wide"], name="wide")] if "stem_wide" in used else []
    made = built([*(STEM if "small" in used else STEM[:1]), *wide, *tail], [1, 4, 8, 8], CONSTANTS)
    Canonicalize().apply(made, context())
    return made


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
    assert {str(n.name) for n in final_heads(assembled(tail).graph)} == heads


@pytest.mark.parametrize("target", ["ort", "rtx", "openvino"])
def test_they_stay_float_and_say_why(target: str) -> None:
    model = assembled(YOLO)
    placed = TARGETS[target].place(model, SCHEMES["w8a8"], context(target).selection, Choices("auto", "auto", "float"))
    assert {n for n, reason in placed.missed if "a head" in reason} == {"a_box", "a_score", "b_box", "b_score", "dfl"}
    assert {str(p.node.name) for p in placed.points if p.is_weight} == {"stem", "small"}


def test_a_head_that_is_most_of_the_network_is_quantized_on_ort() -> None:
    nodes = [STEM[0], node("Conv", ["stem", "wide_w"], ["y"], name="last")]
    model = built(nodes, [1, 4, 8, 8], CONSTANTS)
    placed = TARGETS["ort"].place(model, SCHEMES["w8a8"], context().selection, Choices("auto", "auto", "float"))
    assert {str(p.node.name) for p in placed.points if p.is_weight} == {"stem", "last"}
