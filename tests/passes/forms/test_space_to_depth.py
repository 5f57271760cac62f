"""The rewrites that ONNX Runtime's CPU kernels want: same function, other form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.forms.space_to_depth import SpaceToDepthStem
from tests.passes.forms.small import apply, assert_same, build, ops, random

node = helper.make_node


def stem(kernel: Sequence[int], pads: Sequence[int], shape: Sequence[Any] = (1, 3, 16, 12), **attributes: Any) -> Model:
    conv = node("Conv", ["x", "w", "b"], ["y"], name="stem", **{"strides": [2, 2], "pads": list(pads), **attributes})
    return build([conv], shape, {"w": random(8, 3, *kernel), "b": random(8)})


@pytest.mark.parametrize(
    ("kernel", "pads"),
    [
        ((7, 7), (3, 3, 3, 3)),
        ((3, 3), (1, 1, 1, 1)),
        ((3, 3), (0, 0, 1, 1)),
        ((3, 3), (0, 0, 0, 0)),
        ((2, 2), (0, 0, 0, 0)),
        ((1, 1), (0, 0, 0, 0)),
        ((4, 3), (1, 0, 2, 1)),
        ((5, 7), (2, 3, 1, 2)),
    ],
)
def test_space_to_depth_keeps_the_function(kernel: tuple[int, int], pads: tuple[int, ...]) -> None:
    before = stem(kernel, pads, ("N", 3, 16, 12))
    after, modified, _ = apply(SpaceToDepthStem(), before)
    assert modified and ops(after) == ["SpaceToDepth", "Conv"]
    assert_same(before, after, random(2, 3, 16, 12))


@pytest.mark.parametrize(
    "model",
    [
        stem((3, 3), (1, 1, 1, 1), strides=[1, 1]),
        stem((3, 3), (1, 1, 1, 1), (1, 3, 15, 12)),
        stem((3, 3), (1, 1, 1, 1), (1, 3, "H", "W")),
        stem((3, 3), (2, 2, 2, 2), dilations=[2, 2]),
    ],
    ids=["stride 1", "odd height", "unknown height", "dilated"],
)
def test_space_to_depth_says_why_not(model: Model) -> None:
    after, modified, kinds = apply(SpaceToDepthStem(), model)
    assert not modified and kinds == ["missed"] and ops(after) == ["Conv"]


def test_space_to_depth_without_a_picture() -> None:
    _, modified, kinds = apply(SpaceToDepthStem(), build([node("Relu", ["x"], ["y"])], [1, 4], {}))
    assert not modified and kinds == ["note"]
