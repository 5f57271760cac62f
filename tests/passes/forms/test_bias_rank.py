from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.forms.bias_rank import BiasRank
from tests.passes.forms.small import RNG, apply, build, random, run

node = helper.make_node


def linear(rank: int) -> Model:
    shape = [1, 4, 5, 8][-rank:] if rank > 2 else [4, 8]
    nodes = [node("MatMul", ["x", "w"], ["m"], name="fc"), node("Add", ["b", "m"], ["a"], name="bias")]
    nodes.append(node("Add", ["a", "b"], ["y"], name="again"))
    return build(nodes, shape, {"w": random(8, 8), "b": random(8)})


@pytest.mark.parametrize("rank", [3, 4])
def test_bias_takes_the_rank_of_the_product(rank: int) -> None:
    before = linear(rank)
    after, modified, _ = apply(BiasRank(), before)
    assert modified
    shapes = {n.name: list(v.shape) for n in after.graph for v in n.inputs if v is not None and v.is_initializer() and v.shape}
    assert shapes["bias"] == [1] * (rank - 1) + [8] and shapes["again"] == [8], "the shared bias is copied"
    x = random(*[1, 4, 5, 8][-rank:])
    assert np.array_equal(run(before, x), run(after, x))


def test_bias_of_a_matrix_stays() -> None:
    assert not apply(BiasRank(), linear(2))[1]


def quantized_linear() -> Model:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        node("MatMul", ["d", "wd"], ["m"], name="fc"),
        node("Add", ["m", "b"], ["y"], name="bias"),
    ]
    w = RNG.integers(-127, 128, (8, 8)).astype(np.int8)
    scales = {"s": np.float32(0.02), "z": np.uint8(128), "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8)}
    return build(nodes, [1, 5, 8], {"w": w, "b": random(8), **scales})


def test_bias_rank_decides_whether_the_product_is_an_integer_kernel(tmp_path: Path) -> None:
    """The trap itself: if the first assertion fails, ONNX Runtime has improved and the pass may go."""
    before, x = quantized_linear(), random(1, 5, 8)
    after = apply(BiasRank(), before)[0]
    kernels = []
    for i, model in enumerate((before, after)):
        run(model, x, optimize=True, save=tmp_path / f"{i}.onnx")
        kernels.append({n.op_type for n in onnx.load(tmp_path / f"{i}.onnx").graph.node})
    assert "MatMulIntegerToFloat" not in kernels[0] and "Gemm" in kernels[0]
    assert "MatMulIntegerToFloat" in kernels[1]
