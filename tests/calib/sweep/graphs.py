"""Tiny float graphs for the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.ir.model import Model


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    output: str,
    constants: dict[str, NDArray[Any]],
    opset: int = 17,
    elem: int = T.FLOAT,
) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(output, elem, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return Model.from_proto(onnx.shape_inference.infer_shapes(proto))


def transformer(opset: int = 17, dim: int = 8, batch: int | str = "N") -> Model:
    """Embedding, LayerNorm-like scaling, one attention-shaped MatMul pair, an MLP; int64 ids [batch, 5]."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["h"], name="embed"),
        node("Mul", ["h", "gamma"], ["ln"], name="norm"),
        node("MatMul", ["ln", "wq"], ["q"], name="q"),
        node("Transpose", ["ln"], ["kt"], perm=[0, 2, 1], name="kt"),
        node("MatMul", ["q", "kt"], ["scores"], name="qk"),
        node("Softmax", ["scores"], ["probs"], axis=-1, name="softmax"),
        node("MatMul", ["probs", "ln"], ["ctx"], name="pv"),
        node("Add", ["h", "ctx"], ["res"], name="residual"),
        node("MatMul", ["res", "w1"], ["up"], name="fc1"),
        node("Relu", ["up"], ["act"], name="act"),
        node("MatMul", ["act", "w2"], ["out"], name="fc2"),
    ]
    gamma = np.ones(dim, np.float32)
    gamma[2] = 20
    shapes = {"table": (50, dim), "wq": (dim, dim), "w1": (dim, 2 * dim), "w2": (2 * dim, 3)}
    constants = {n: (rng.normal(size=s) / 3).astype(np.float32) for n, s in shapes.items()} | {"gamma": gamma}
    return build(nodes, {"ids": (T.INT64, [batch, 5])}, "out", constants, opset)


def cnn(opset: int = 17, batch: int | str = "N") -> Model:
    """Conv, Relu, Conv, pool, Gemm on float pictures [batch, 3, 8, 8]."""
    rng = np.random.default_rng(1)
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "k1"], ["c1"], pads=[1, 1, 1, 1], name="conv1"),
        node("Relu", ["c1"], ["a1"], name="relu1"),
        node("Conv", ["a1", "k2"], ["c2"], strides=[2, 2], pads=[1, 1, 1, 1], name="conv2"),
        node("GlobalAveragePool", ["c2"], ["pool"], name="pool"),
        node("Flatten", ["pool"], ["flat"], name="flatten"),
        node("Gemm", ["flat", "w"], ["logits"], name="fc"),
    ]
    shapes = {"k1": (4, 3, 3, 3), "k2": (6, 4, 3, 3), "w": (6, 10)}
    constants = {n: (rng.normal(size=s) / 3).astype(np.float32) for n, s in shapes.items()}
    return build(nodes, {"x": (T.FLOAT, [batch, 3, 8, 8])}, "logits", constants, opset)
