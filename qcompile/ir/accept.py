"""What a file may hold beyond what onnx_ir reads: spelled out where it can be, else said with its own cause.

Outputs that are maps, or sequences of maps (ZipMap), travel without a type: ONNX Runtime finds it from the node, and the file
that is written states it again (`state_types`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TypeProto, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir.sound import bodies

_TYPE = "qcompile.type"


def spell_out(proto: ModelProto, path: Path) -> None:
    """Sparse initializers become dense ones; equal copies of an initializer become one; maps are set aside.

    Raises:
        ModelError: a name means two things, or an input is a map.
    """
    for graph in _graphs(proto.graph):
        _require_no_map_inputs(graph, path)
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        _join_copies(graph, path)
        _require_one_maker(graph, path)
    set_maps_aside(proto)


def in_order(graph: ir.Graph, path: Path) -> None:
    """Nodes behind what they read, as ONNX Runtime sorts them too.

    Raises:
        ModelError: the graph has a cycle.
    """
    seen = set[ir.Node]()
    for node in graph:
        if any(v is not None and (p := v.producer()) is not None and p.graph is graph and p not in seen for v in _reads(node)):
            break
        seen.add(node)
    else:
        return
    try:
        graph.sort()
    except ValueError as e:
        raise ModelError(f"{path}: its nodes read each other in a circle; export the model again") from e


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """Inputs, and what the bodies of a node take from outside."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from (v for inner in attribute.as_graph().all_nodes() for v in inner.inputs)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from _graphs(body)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    values, where = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if where.ndim == 1:
        dense.reshape(-1)[where] = values
    else:
        dense[tuple(where.T)] = values
    return numpy_helper.from_array(dense, sparse.values.name)


def _join_copies(graph: GraphProto, path: Path) -> None:
    names = [t.name for t in graph.initializer]
    if len(set(names)) == len(names):
        return
    kept: dict[str, TensorProto] = {}
    for tensor in graph.initializer:
        other = kept.setdefault(tensor.name, tensor)
        if other is not tensor and not _same(other, tensor):
            raise ModelError(f"{path}: two initializers are named {tensor.name!r}; export the model again")
    copies = list(kept.values())
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _same(a: TensorProto, b: TensorProto) -> bool:
    """Of large weights the data is not here, so that it cannot be compared."""
    stored = a.raw_data or a.float_data or a.int64_data or a.int32_data or a.data_location == TensorProto.EXTERNAL
    return bool(stored) and a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


def _require_one_maker(graph: GraphProto, path: Path) -> None:
    makers: dict[str, str] = {}
    inputs = [v.name for v in graph.input]
    if twice := next((name for name in inputs if inputs.count(name) > 1), None):
        raise ModelError(f"{path}: two inputs are named {twice!r}; rename one")
    given = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in given:
                what = f"{_called(node, index)} makes {name!r}, which is an input or a weight"
                raise ModelError(f"{path}: {what}; rename one of them")
            if name in makers:
                both = f"{makers[name]} and {_called(node, index)}"
                raise ModelError(f"{path}: the tensor {name!r} is made by two nodes ({both}); rename one")
            makers[name] = _called(node, index)


def _called(node: NodeProto, index: int) -> str:
    return node.name or f"{node.op_type} number {index}"


def _require_no_map_inputs(graph: GraphProto, path: Path) -> None:
    for value in graph.input:
        if _has_map(value.type):
            what = f"{path}: the input {value.name!r} is a map, which qcompile has no data for"
            raise ModelError(f"{what}; cut the model behind the node that reads it")


def set_maps_aside(proto: ModelProto) -> None:
    """Take the types of maps away, in place: noted beside the values, in a form that onnx_ir carries."""
    for graph in _graphs(proto.graph):
        for value in (*graph.output, *graph.value_info):
            if _has_map(value.type):
                value.metadata_props.add(key=_TYPE, value=value.type.SerializeToString(deterministic=True).hex())
                value.ClearField("type")


def state_types(proto: ModelProto) -> ModelProto:
    """Give the maps of `proto` their types again, in place; returns it."""
    for value in proto.graph.output:
        kept = next((p for p in value.metadata_props if p.key == _TYPE), None)
        if kept is not None:
            value.type.ParseFromString(bytes.fromhex(kept.value))
            value.metadata_props.remove(kept)
    return proto


def _has_map(kind: TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _has_map(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _has_map(kind.optional_type.elem_type)
    return kind.HasField("map_type")
