"""Concrete tensor shapes of a model at given input shapes.

ONNX shape inference alone loses track where exporters compute pads and reshape targets in the graph
(`ConstantOfShape`, `Concat`, `Slice`, `Cast` chains); folding those small constants between rounds recovers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompile.ir.infer import infer_proto
from qcompile.ir.optable import ops_with

Shape = Sequence[int]
Constants = dict[str, NDArray[np.generic]]
SMALL = 4096  # elements: shape arithmetic is tiny, weights are not
ROUNDS = 12
NEVER_FOLDED = ops_with("random") | {"If", "Loop", "Scan", "QuantizeLinear", "DequantizeLinear"}


def concrete_shapes(model: ModelProto, inputs: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Tensor name -> shape when the graph inputs have the shapes `inputs`; tensors with unknown axes are left out."""
    skeleton, constants = _skeleton(model, inputs)
    found = _infer(skeleton)
    for _ in range(ROUNDS):
        if not _fold(skeleton, constants, found):
            break
        found = _infer(skeleton)
    return found | {t.name: list(t.dims) for t in model.graph.initializer} | {n: list(a.shape) for n, a in constants.items()}


def dims_of(value: ValueInfoProto) -> list[int]:
    """The axes of `value`; 0 where unknown, symbolic or empty."""
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def _skeleton(model: ModelProto, inputs: Mapping[str, Shape]) -> tuple[ModelProto, Constants]:
    """A copy with fixed input shapes, weights turned into inputs, and recorded shapes forgotten; and its small constants."""
    graph = onnx.GraphProto(name="shapes")
    graph.node.extend(_shape_like(n) for n in model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(ValueInfoProto(name=v.name, type=_untyped(v)) for v in model.graph.output)
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False):
            dim.dim_value = size
    known = {v.name for v in graph.input}
    constants: Constants = {}
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
            constants[tensor.name] = numpy_helper.to_array(tensor)
        elif tensor.name not in known:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    skeleton = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    return skeleton, constants


def _shape_like(node: NodeProto) -> NodeProto:
    """TensorRT's quantizers are unknown to shape inference; their first output has the shape of their first input."""
    if node.domain != "trt":
        return node
    return helper.make_node("Identity", node.input[:1], node.output[:1], name=node.name)


def _untyped(value: ValueInfoProto) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(value.type.tensor_type.elem_type, None)


def _infer(skeleton: ModelProto) -> dict[str, list[int]]:
    graph = infer_proto(skeleton).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    shaped = {v.name: dims_of(v) for v in values if v.type.tensor_type.HasField("shape")}
    return {name: dims for name, dims in shaped.items() if all(d > 0 for d in dims)}


def _fold(skeleton: ModelProto, constants: Constants, shapes: Mapping[str, list[int]]) -> bool:
    """Replace nodes whose value is now known by initializers; whether any was."""
    kept: list[NodeProto] = []
    for node in skeleton.graph.node:
        value = _value(node, constants, shapes)
        if value is None:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        constants[node.output[0]] = value
        skeleton.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    folded = len(kept) < len(skeleton.graph.node)
    del skeleton.graph.node[:]
    skeleton.graph.node.extend(kept)
    return folded


def _value(node: NodeProto, constants: Constants, shapes: Mapping[str, list[int]]) -> NDArray[np.generic] | None:
    if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
        return np.array(shapes[node.input[0]], dtype=np.int64)
    if node.domain or node.op_type in NEVER_FOLDED or len(node.output) != 1 or not all(x in constants for x in node.input if x):
        return None
    feeds: dict[str, Any] = {x: constants[x] for x in node.input if x}
    try:
        results: Any = ReferenceEvaluator(node).run(None, feeds)
    except Exception:  # an operator without a reference implementation: its shape stays unknown
        return None
    small = isinstance(results[0], np.ndarray) and results[0].size <= SMALL and results[0].dtype.kind in "biuf"
    return results[0] if small else None
