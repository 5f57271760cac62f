"""What follows a tensor element by element, as one function, compared with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.execute.opening import open_model
from qcompile.structure.response import response
from tests.passes.models import built

node = helper.make_node
CONSTANTS = {
    "three": np.float32(3),
    "zero": np.float32(0),
    "six": np.float32(6),
    "half": np.float32(0.5),
    "row": np.ones(4, np.float32),
}
SWISH = [
    node("Add", ["c", "three"], ["a"]),
    node("Clip", ["a", "zero", "six"], ["k"]),
    node("Mul", ["c", "k"], ["m"]),
    node("Div", ["m", "six"], ["y"]),
]
SILU = [node("Sigmoid", ["c"], ["s"]), node("Mul", ["c", "s"], ["m"]), node("Mul", ["m", "half"], ["y"])]
SOLO = {
    op: [node(op, ["c"], ["y"])] for op in ("HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Mish", "Relu", "Softplus", "Tanh")
}
BRANCHED = [node("Sigmoid", ["c"], ["s"]), node("MatMul", ["s", "square"], ["m"]), node("Add", ["c", "m"], ["y"])]
BY_ROW = [node("Mul", ["c", "row"], ["y"])]


def answer(nodes: Sequence[Any]) -> tuple[Any, np.ndarray, np.ndarray]:
    """The response of `c` = x + 0, and x and y of a run."""
    constants = CONSTANTS | {"square": np.eye(4, dtype=np.float32)}
    model = built([node("MatMul", ["x", "square"], ["c"]), *nodes], ["N", 4], constants, opset=18)
    x = np.linspace(-8, 8, 64).reshape(16, 4).astype(np.float32)
    c = next(n for n in model.graph if n.op_type == "MatMul").outputs[0]
    return response(c), x, np.asarray(open_model(model).run(None, {"x": x})[0])


@pytest.mark.parametrize("nodes", [SWISH, SILU, *SOLO.values()], ids=["hard swish", "silu, scaled", *SOLO])
def test_it_is_the_function_behind(nodes: Sequence[Any]) -> None:
    found, x, y = answer(nodes)
    assert found is not None and found.end.name == "y" and len(found.nodes) == len(nodes)
    np.testing.assert_allclose(found(x.astype(np.float64)), y, atol=2e-6)


@pytest.mark.parametrize("nodes", [BRANCHED, BY_ROW], ids=["another reader", "a constant a channel"])
def test_there_is_none(nodes: Sequence[Any]) -> None:
    assert answer(nodes)[0] is None
