"""Shapes and types by ONNX's own inference: from what operators do, never from what a file declares about their results."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, TypeProto
from onnx_ir import serde

from qcompile.ir.model import Model
from qcompile.ir.schemas import complete_types
from qcompile.ir.tensors import elsewhere

_SHAPES = 1000  # bytes: longer constants are no shapes, and their values say nothing


def infer_shapes(model: Model) -> None:
    """Give values the types and shapes that inference finds; the others keep theirs.  Quiet where inference fails.

    As `onnx_ir`'s pass, but in time linear in the constants, without reading the answer back as a whole model; sequences and
    optional values stay what they are.
    """
    values = [v for v in model.graph.initializers.values() if _long(v.const_value)]
    with elsewhere(values, "weights"):
        proto = ir.to_proto(model.ir)
    with contextlib.suppress(Exception):  # of as many classes as there are causes
        _take_over(model.graph, onnx.shape_inference.infer_shapes(proto, data_prop=True).graph)
    for graph in model.ir.graphs():
        complete_types(graph, model.ir.opset_imports)


def forget_declared(model: Model) -> None:
    """Drop the declared shapes of what operators of the default domain make: exporters and tools leave wrong ones behind."""
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                value.shape = None


def restore_declared(model: Model, source: Model) -> list[str]:
    """Give the outputs of `model` the dimensions that `source` declares, where inference does not contradict them.

    Returns a line for every output whose declared shape is wrong.
    """
    declared = {v.name: v.shape for v in source.graph.outputs if v.shape is not None}
    wrong = list[str]()
    for value in model.graph.outputs:
        shape = declared.get(value.name)
        if shape is None or value.is_graph_input():
            continue
        if value.shape is not None and not _agree(value.shape, shape):
            wrong.append(
                f"output {value.name!r} is declared as {_shown(shape)} and is {_shown(value.shape)}: the declaration was dropped"
            )
        else:
            value.shape = shape.copy()
    return wrong


def _shown(shape: ir.Shape) -> str:
    return f"[{', '.join(str(d) if isinstance(d, int) or d.value is not None else '?' for d in shape)}]"


def _agree(a: ir.Shape, b: ir.Shape) -> bool:
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True) if isinstance(x, int) and isinstance(y, int))


def _long(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes > _SHAPES and tensor.dtype != ir.DataType.STRING


def _take_over(graph: ir.Graph, inferred: GraphProto) -> None:
    known = {v.name: v.type for v in (*inferred.output, *inferred.value_info)}
    for value in (v for node in graph for v in node.outputs):
        if (told := known.get(str(value.name))) is not None:
            _tell(value, told)
    for node, twin in zip(graph, inferred.node, strict=True):
        for attribute in twin.attribute:
            for body, proto in zip(_bodies(node.attributes.get(attribute.name)), _protos(attribute), strict=True):
                _take_over(body, proto)


def _bodies(attribute: ir.Attr | None) -> Sequence[ir.Graph]:
    if attribute is None or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return ()
    return [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()


def _protos(attribute: AttributeProto) -> Sequence[GraphProto]:
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _tell(value: ir.Value, told: TypeProto) -> None:
    kind, shape = serde.deserialize_type_proto_for_type(told), serde.deserialize_type_proto_for_shape(told)
    if kind is not None and kind != value.type:
        value.type = kind
    if shape is not None and shape != value.shape and isinstance(kind, ir.TensorType | None):
        value.shape = shape
