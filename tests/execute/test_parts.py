"""Outputs that join unlike quantities are reported by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import parser

from qcompile.execute.figures import OutputTally, figures, tallies
from qcompile.execute.parts import Join, PartTally, joins
from qcompile.ir.jumps import Nature
from qcompile.ir.model import Model

RNG = np.random.default_rng(0)
BOXES, SCORES = 4, 6


def graph(body: str) -> Model:
    head = '<ir_version: 9, opset_import: ["" : 17]> g (float[N,4,9] boxes, float[N,6,9] scores) => (float[N,K,9] y)'
    return Model.from_proto(parser.parse_model(f"{head} {{ {body} }}"))


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("a = Relu(boxes) b = Sigmoid(scores) y = Concat<axis = 1>(a, b)", 1),
        ("a = Relu(boxes) b = Sigmoid(scores) c = Concat<axis = -2>(a, b) y = Transpose<perm = [0, 2, 1]>(c)", 2),
        ("a = Relu(boxes) b = Relu(scores) c = Concat<axis = 1>(a, b) d = Identity(c) y = Sigmoid(d)", 1),
    ],
)
def test_a_concat_in_front_of_an_output_is_seen(body: str, axis: int) -> None:
    assert joins(graph(body)) == [Join(axis, (("a", BOXES), ("b", SCORES)))]


@pytest.mark.parametrize("body", ["y = Relu(boxes)", "y = Identity(boxes)"])
def test_nothing_else_is(body: str) -> None:
    assert joins(graph(body)) == [None]


def test_the_shares_of_a_softmax_are_alike() -> None:
    assert joins(graph("a = Concat<axis = 1>(boxes, scores) b = Softmax<axis = 1>(a) y = Identity(b)")) == [Join(1, ())]
    sure = np.tile([[0.9999, 0.0001]], (8, 1))
    less = sure + np.array([-0.001, 0.001])
    tally, cut = PartTally(Join(-1, ())), PartTally()
    tally.add(sure, less)
    cut.add(sure, less)
    assert tally.parts(60.0) == ()
    assert cut.parts(60.0)[0].sqnr_db < 0


def detections(noise: float, axis: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boxes in pixels and scores below 1 [2, 10, 9], and the same with as much noise on both."""
    x = np.concatenate([RNG.uniform(0, 640, (2, BOXES, 9)), RNG.uniform(0, 1, (2, SCORES, 9))], 1)
    moved = np.moveaxis(x, 1, axis)
    return moved, moved + RNG.normal(0, noise, moved.shape)


def parts(join: Join | None, *pairs: tuple[NDArray[Any], NDArray[Any]]) -> list[tuple[str, float]]:
    tally = OutputTally("y", Nature(), parts=PartTally(join))
    for pair in pairs:
        tally.add(*pair)
    return [(p.name, round(p.sqnr_db)) for p in tally.figure().parts]


def test_the_small_part_of_a_join_comes_first() -> None:
    found = parts(Join(1, (("boxes", BOXES), ("scores", SCORES))), detections(0.3), detections(0.3))
    assert [n for n, _ in found] == ["scores", "boxes"]
    assert found[0][1] < 10 and found[1][1] > 55


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_of_unlike_size_are_found_without_a_concat(axis: int) -> None:
    found = parts(None, detections(0.3, axis))
    assert [n for n, _ in found] == [f"4-9 of axis {axis}", f"0-3 of axis {axis}"]


@pytest.mark.parametrize("join", [None, Join(1, (("a", 5), ("b", 5)))])
def test_alike_quantities_have_no_parts(join: Join | None) -> None:
    x = RNG.normal(size=(4, 10, 3))
    assert parts(join, (x, x + RNG.normal(0, 0.1, x.shape))) == []


def test_silent_channels_and_other_lengths_are_no_part() -> None:
    x = RNG.normal(size=(4, 10))
    x[:, 3] = 0
    assert parts(None, (x, x + 0.01)) == []
    assert [n for n, _ in parts(None, detections(0.3), (np.ones((2, 10, 4)), np.ones((2, 10, 4))))] != []


def test_a_model_knows_its_joins() -> None:
    model = graph("a = Relu(boxes) b = Sigmoid(scores) y = Concat<axis = 1>(a, b)")
    (tally,) = tallies(model)
    tally.add(*detections(0.3))
    (found,) = figures([tally])
    assert found.worst_db == found.parts[0].sqnr_db < 10 < (found.sqnr_db or 0)


@pytest.mark.parametrize(("shape", "dark", "parts"), [((2, 1, 8, 8), 3, 0), ((2, 8, 8, 1), 1, 0), ((2, 4, 8, 8), 1, 2)])
def test_a_dark_border_of_a_map_is_no_part_and_a_small_channel_is(shape: tuple[int, ...], dark: int, parts: int) -> None:
    x = np.ones(shape)
    x[tuple([slice(None)] * dark + [0])] = 1e-4
    tally = PartTally()
    tally.add(x, x + 1e-3)
    assert len(tally.parts(60.0)) == parts
