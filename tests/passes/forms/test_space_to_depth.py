"""The rewrites that ONNX Runtime's CPU kernels want: same function, other form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.execute.session import session_options
from qcompile.ir.model import Model
from qcompile.passes.forms.bias_rank import BiasRank
from qcompile.passes.forms.fold_pad import FoldPad
from qcompile.passes.forms.gelu_order import GeluOrder
from qcompile.passes.forms.space_to_depth import SpaceToDepthStem
from qcompile.pipeline.base import Pass, PassContext
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS

RNG = np.random.default_rng(0)
node = helper.make_node


def build(nodes: list[onnx.NodeProto], shape: Sequence[Any], constants: dict[str, NDArray[Any]], elem: int = T.FLOAT) -> Model:
    x, y = helper.make_tensor_value_info("x", elem, shape), helper.make_tensor_value_info("y", elem, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return Model.from_proto(onnx.shape_inference.infer_shapes(made))


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def run(model: Model, x: NDArray[Any], optimize: bool = False, save: Path | None = None) -> NDArray[Any]:
    options = session_options(optimize="all" if optimize else "off")
    if save is not None:
        options.optimized_model_filepath = str(save)
    session = ort.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def apply(rewrite: Pass, model: Model) -> tuple[Model, bool, list[str]]:
    """The rewritten copy, whether it changed, and the kinds of its remarks."""
    after, ctx = model.clone(), PassContext(SCHEMES["w8a8"], TARGETS["ort"])
    return after, rewrite.apply(after, ctx).modified, [r.kind for r in ctx.remarks.all]


def assert_same(before: Model, after: Model, x: NDArray[Any]) -> None:
    a, b = run(before, x), run(after, x)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 5e-6 * np.abs(a).max()


def ops(model: Model) -> list[str]:
    return [n.op_type for n in model.graph]


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


def padded(amounts: list[int], value: float = 0.0, **attributes: Any) -> Model:
    pad = node("Pad", ["x", "p", "v"], ["wide"], name="pad", **attributes)
    conv = node("Conv", ["wide", "w"], ["y"], name="conv", pads=[1, 0, 0, 1])
    return build([pad, conv], [1, 2, 9, 9], {"p": np.array(amounts), "v": np.float32(value), "w": random(4, 2, 3, 3)})


def test_pad_goes_into_the_convolution() -> None:
    before = padded([0, 0, 1, 2, 0, 0, 3, 4])
    after, modified, _ = apply(FoldPad(), before)
    assert modified and ops(after) == ["Conv"]
    assert_same(before, after, random(1, 2, 9, 9))


@pytest.mark.parametrize(
    "model",
    [padded([0, 0, 1, 1, 0, 0, 1, 1], 2.0), padded([0, 0, 1, 1, 0, 0, -1, 1]), padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect")],
    ids=["not zero", "crop", "reflect"],
)
def test_other_pads_stay(model: Model) -> None:
    _, modified, kinds = apply(FoldPad(), model)
    assert not modified and kinds == ["missed"]


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


def gelu(other: str = "x") -> Model:
    nodes = [
        node("Div", ["x", "root"], ["d"], name="div"),
        node("Erf", ["d"], ["e"], name="erf"),
        node("Add", ["e", "one"], ["a"], name="add"),
        node("Mul", ["half", "a"], ["h"], name="half_mul"),
        node("Mul", [other, "h"], ["y"], name="gelu"),
    ]
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5), "k": random(8)}
    return build(nodes, [2, 8], constants)


def test_gelu_is_put_into_the_order_that_is_fused(tmp_path: Path) -> None:
    before, x = gelu(), random(2, 8)
    after, modified, _ = apply(GeluOrder(), before)
    assert modified and apply(GeluOrder(), after)[1] is False
    assert_same(before, after, x)
    run(after, x, optimize=True, save=tmp_path / "o.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Gelu"]


def test_a_product_that_is_no_gelu_stays() -> None:
    assert not apply(GeluOrder(), gelu("k"))[1]
