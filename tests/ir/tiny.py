"""Tiny models for the ir tests, written as ONNX text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

from qcompile.ir.model import Model

LINEAR = """
<ir_version: 9, opset_import: ["" : 17], producer_name: "tiny">
linear (float[N,4] x) => (float[N,4] y) {
  h = MatMul(x, w)
  a = Relu(h)
  b = MatMul(a, w)
  y = Add(b, bias)
}
"""
VIT_FIXED = """
<ir_version: 9, opset_import: ["" : 17]>
vit (float[1,3,8,8] x) => (float[1,6] y)
<int64[3] flat = {1, 8, -1}, int64[4] heads = {1, 5, 2, 4}, int64[3] merged = {2, 5, 4}, int64[4] split = {1, 2, 5, 4},
 int64[3] back = {1, 5, 8}, int64[1] zero = {0}>
{
  p = Conv <kernel_shape = [4, 4], strides = [4, 4]> (x, kernel)
  f = Reshape(p, flat)
  t = Transpose <perm = [0, 2, 1]> (f)
  c = Concat <axis = 1> (cls, t)
  e = Add(c, pos)
  h = MatMul(e, wq)
  r = Reshape(h, heads)
  s = Transpose <perm = [0, 2, 1, 3]> (r)
  m = Reshape(s, merged)
  k = Transpose <perm = [0, 2, 1]> (m)
  q = MatMul(m, k)
  a = Softmax <axis = -1> (q)
  o = MatMul(a, m)
  o4 = Reshape(o, split)
  o5 = Transpose <perm = [0, 2, 1, 3]> (o4)
  u = Reshape(o5, back)
  g = Gather <axis = 1> (u, zero)
  d = Squeeze(g, one)
  y = MatMul(d, head)
}
"""


def _with_weights(text: str, weights: dict[str, NDArray[np.generic]]) -> onnx.ModelProto:
    proto = parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
    return proto


def linear(size: int = 4) -> onnx.ModelProto:
    """MatMul, Relu, MatMul with the same (shared) weight, Add."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(size, size)).astype(np.float32), "bias": rng.normal(size=size).astype(np.float32)}
    return _with_weights(LINEAR.replace("N,4", f"N,{size}"), weights)


def fixed_vit() -> onnx.ModelProto:
    """A one-layer attention net whose exporter baked batch 1 into every shape; value shapes inferred."""
    rng = np.random.default_rng(1)
    shapes = {"kernel": (8, 3, 4, 4), "cls": (1, 1, 8), "pos": (1, 5, 8), "wq": (8, 8), "head": (8, 6)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return onnx.shape_inference.infer_shapes(_with_weights(VIT_FIXED, weights | {"one": np.array([1])}))


def branches() -> onnx.ModelProto:
    """An If whose branches hold an initializer and a Constant node."""
    t = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    w = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(np.full(4, 2, np.float32)))
    then = helper.make_graph([helper.make_node("Add", ["x", "w"], ["t"])], "then", [], [t], [w])
    other = helper.make_graph([constant, helper.make_node("Mul", ["x", "v"], ["t"])], "else", [], [t])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([node], "g", [x, helper.make_tensor_value_info("c", TensorProto.BOOL, [])], [y])
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


def run(model: Model | Path | onnx.ModelProto, feeds: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """The first output in ONNX Runtime, optimizations off, so that equal graphs give equal bits."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    proto = model.to_proto() if isinstance(model, Model) else model
    source = str(proto) if isinstance(proto, Path) else proto.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
