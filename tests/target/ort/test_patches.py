"""Which convolutions are taken for patch embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Choices
from tests.passes.models import built
from tests.passes.running import context


@pytest.mark.parametrize(
    ("kernel", "attributes", "patches"),
    [
        ((1, 5), {"pads": [0, 2, 0, 2]}, False),  # one axis: Keras' Conv1D
        ((3, 3), {"pads": [1, 1, 1, 1]}, False),  # every position: a head whose maps become rows
        ((4, 4), {"strides": [4, 4]}, True),
        ((3, 3), {"strides": [2, 2]}, True),  # a stem of convolutions
        ((1, 1), {}, True),  # behind such a stem
    ],
)
def test_patch_embeddings(kernel: tuple[int, int], attributes: dict[str, Any], patches: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 4, *kernel)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv", **attributes)]
    nodes += [helper.make_node("Reshape", ["c", "flat"], ["r"]), helper.make_node("Transpose", ["r"], ["y"], perm=[0, 2, 1])]
    model = built(nodes, ["N", 4, 8, 8], {"w": weight, "flat": np.array([0, 8, -1])})
    ctx = context()
    Canonicalize().apply(model, ctx)
    placed = TARGETS["ort"].place(model, SCHEMES["w8a8"], ctx.selection, Choices("auto", "auto", "float"))
    assert any("patch embedding" in reason for _, reason in placed.missed) is patches
