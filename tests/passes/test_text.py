from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir.edit import set_constant
from qcompile.ir.text import print_model
from tests.passes.measures import constants_of, outputs
from tests.passes.text import read_model

WEIGHTS = """\
weights seed 3
  scale, shift = normal[4] * 0.5
  w = uniform(1, 2)[4, 6]
  w *= exp(normal[4, 1])
"""
GRAPH = """\
graph opset=17 (x: FLOAT[N,3,4]) -> (y: FLOAT[N,3,6], i: INT64[3])
  n = LayerNormalization(x, scale, shift) {axis=-1 epsilon=0.001} @norm
  h = MatMul(n, w) @fc
  a, - = Dropout(h, -, const<bool[]: 0>) @drop
  y = Mul(a, const<float32[6]: 1, 2, 0.5, 1e-3, -1, 0>) @scale
  i = Shape(x) @shape
"""


def test_what_is_written_is_read_and_printed_again() -> None:
    written = read_model(WEIGHTS + GRAPH)
    assert written.print(written.model) == GRAPH
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    y, i = outputs(written.model, {"x": x})
    assert y.shape == (2, 3, 6) and i.tolist() == [2, 3, 4]


def test_weights_are_drawn_in_order_from_one_generator() -> None:
    rng, made = np.random.default_rng(3), constants_of(read_model(WEIGHTS + GRAPH).model)
    scale, shift, w = rng.standard_normal(4) * 0.5, rng.standard_normal(4) * 0.5, rng.uniform(1, 2, (4, 6))
    np.testing.assert_array_equal(made["scale"], scale.astype(np.float32))
    np.testing.assert_array_equal(made["shift"], shift.astype(np.float32))
    np.testing.assert_allclose(made["w"], w * np.exp(rng.standard_normal((4, 1))), rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (np.float32(2), "w * const<float32[]: 2>"),
        (np.float32([[1], [2], [3], [4]]), "w * const<float32[4, 1]: 1, 2, 3, 4>"),
        (np.float32([[1, 2, 3, 4, 5, 6]]), "w * const<float32[1, 6]: 1, 2, 3, 4, 5, 6>"),
        (np.arange(1, 25, dtype=np.float32).reshape(4, 6), "const<float32[4, 6]: min"),
    ],
)
def test_a_scaled_weight_is_told_by_its_factors(factor: np.ndarray, said: str) -> None:
    written = read_model(WEIGHTS + GRAPH)
    changed = written.model.clone()
    set_constant(changed.graph.node("fc"), 1, constants_of(changed)["w"] * factor)
    assert f"h = MatMul(n, {said}" in written.print(changed)
    assert "scale, shift" in written.print(changed) and "scale, shift" not in print_model(changed)


@pytest.mark.parametrize("line", ["y = Mul(x, x)", "y Mul(x, x) @n", "graph opset=17 x -> y"])
def test_a_line_that_cannot_be_read_is_named(line: str) -> None:
    with pytest.raises(AssertionError, match="cannot be read"):
        read_model(f"graph opset=17 (x: FLOAT[2]) -> (y: FLOAT[2])\n  {line}")
