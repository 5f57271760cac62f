"""Shapes and types by ONNX's own inference: from what operators do, never from what a file declares about their results."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, TypeProto
from onnx_ir import serde

from qcompile.ir.model import Model
from qcompile.ir.schemas import complete_types
from qcompile.ir.tensors import elsewhere

_SHAPES = 1000  # bytes: longer constants are no shapes, and their values say nothing
_FOLLOWED = 1 << 22


def infer_shapes(model: Model) -> None:
    """Give values the types and shapes that inference finds; the others keep theirs.  Quiet where inference fails.

    As `onnx_ir`'s pass, but in time linear in the constants, without reading the answer back as a whole model; sequences and
    optional values stay what they are.
    """
    values = [v for v in model.graph.initializers.values() if _long(v.const_value)]
    with elsewhere(values, "weights"):
        proto = ir.to_proto(model.ir)
    with contextlib.suppress(Exception):  # of as many classes as there are causes
        _take_over(model.graph, infer_proto(proto).graph)
    for graph in model.ir.graphs():
        complete_types(graph, model.ir.opset_imports)


def infer_proto(proto: onnx.ModelProto) -> onnx.ModelProto:
    """By onnx's inference, shapes that are computed followed too; raises whatever it does.

    It holds every element of what it follows, some 100 bytes each: not where one axis of an input alone would fill the memory.
    """
    sizes = [d.dim_value for v in proto.graph.input for d in v.type.tensor_type.shape.dim]
    return onnx.shape_inference.infer_shapes(proto, data_prop=max(sizes, default=0) <= _FOLLOWED)


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


def drop_false_names(model: Model, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> list[str]:
    """Take the name off sizes of inputs that share one and differ in the data: an engine would hold them to be equal.

    `shapes`: `min` and `max` of each input's shape.  Returns a line for every such name.
    """
    seen = dict[str, set[tuple[int, int]]]()
    for value in model.graph.inputs:
        bounds = shapes.get(str(value.name))
        if value.shape is not None and bounds is not None and len(value.shape) == len(bounds["min"]):
            for size, bound in zip(value.shape, zip(bounds["min"], bounds["max"], strict=True), strict=True):
                seen.setdefault(_name(size), set()).add(bound)
    false = {name for name, bounds in seen.items() if name and len(bounds) > 1}
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)) if false else ():
        if value.shape is not None:
            value.shape = ir.Shape([None if _name(size) in false else size for size in value.shape])
    return [f"sizes of inputs are named {name!r} and differ in the data: the name was dropped" for name in sorted(false)]


def _name(size: int | ir.SymbolicDim) -> str:
    return "" if isinstance(size, int) else size.value or ""


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
