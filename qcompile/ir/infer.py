"""ONNX's shape inference on a `Model`: weights stay out of the message, and only what it says of tensors is taken over."""

from __future__ import annotations

import contextlib

import onnx
import onnx_ir as ir
from onnx import GraphProto, TypeProto
from onnx_ir import serde

from qcompile.ir.model import Model
from qcompile.ir.tensors import elsewhere

_SHAPES = 1000  # bytes: longer constants are no shapes, and their values say nothing


def infer_shapes(model: Model) -> None:
    """Give values the types and shapes that ONNX infers, where it infers one; a graph that it refuses stays as it is.

    As `onnx_ir`'s pass does it, but in time linear in the constants, without reading the answer back as a whole model.
    """
    values = [v for v in model.graph.initializers.values() if _long(v.const_value)]
    with elsewhere(values, "weights"):
        proto = ir.to_proto(model.ir)
    with contextlib.suppress(Exception):  # of many classes: types that do not fit, unknown operators in strict mode
        _take_over(model.graph, onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph)


def _long(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes > _SHAPES and tensor.dtype != ir.DataType.STRING


def _take_over(graph: ir.Graph, inferred: GraphProto) -> None:
    known = {v.name: v.type for v in (*inferred.input, *inferred.output, *inferred.value_info)}
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if (told := known.get(str(value.name))) is not None and told.HasField("tensor_type"):
            _tell(value, told)
    for node, twin in zip(graph, inferred.node, strict=True):
        bodies = {a.name: list(a.graphs) or [a.g] for a in twin.attribute if a.graphs or a.HasField("g")}
        for name, protos in bodies.items():
            attribute = node.attributes[name]
            held = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
            for body, proto in zip(held, protos, strict=True):
                _take_over(body, proto)


def _tell(value: ir.Value, told: TypeProto) -> None:
    shape = serde.deserialize_type_proto_for_shape(told)
    if shape is not None and shape != value.shape:
        value.shape = shape
    dtype = ir.DataType(told.tensor_type.elem_type)
    if dtype not in (ir.DataType.UNDEFINED, value.dtype):
        value.dtype = dtype
