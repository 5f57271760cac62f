"""What a file says of itself, checked before native code believes it: axes, sizes, stored bytes, recursion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from qcompile.errors import ModelError

MOST_AXES = 1024
MOST_SIZE = 2**31 - 1
_AXES = ("axis", "axes")
_SIZED = frozenset(int(t) for t in ir.DataType if t not in (ir.DataType.UNDEFINED, ir.DataType.STRING))


def require_sound(proto: ModelProto, tensors: Iterable[TensorProto], path: Path) -> None:
    """Check a model that was just read; `tensors` are all constants in it.

    Raises:
        ModelError: an axis beyond any tensor, a negative or a huge size, data that is longer or shorter than its shape, or a
            function that calls itself.
    """
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.name in _AXES:
                _require_axes(node, attribute, path)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        _require_sizes(value, path)
    for tensor in tensors:
        _require_data(tensor, path)
    _require_no_recursion(proto.functions, path)


def _require_axes(node: NodeProto, attribute: AttributeProto, path: Path) -> None:
    wrong = next((a for a in (attribute.i, *attribute.ints) if abs(a) > MOST_AXES), None)
    if wrong is not None:
        what = f"{path}: node {node.name or node.op_type!r} has {attribute.name} {wrong}, which no tensor has"
        raise ModelError(f"{what}; export the model again")


def _require_sizes(value: ValueInfoProto, path: Path) -> None:
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
    wrong = next((s for s in sizes if s > MOST_SIZE), None)
    if wrong is not None:
        raise ModelError(f"{path}: tensor {value.name!r} has an axis of {wrong:,}; ONNX Runtime takes at most {MOST_SIZE:,}")


def _require_data(tensor: TensorProto, path: Path) -> None:
    """Of what is stored as bytes in the file itself."""
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{path}: the weight {tensor.name!r} has a negative size {list(tensor.dims)}; export the model again")
    if tensor.data_type not in _SIZED or not tensor.raw_data or tensor.data_location == TensorProto.EXTERNAL:
        return
    wanted = stored_bytes(tensor)
    if wanted != len(tensor.raw_data):
        what = f"{path}: the weight {tensor.name!r} of shape {list(tensor.dims)} takes {wanted:,} bytes"
        raise ModelError(f"{what}, the file holds {len(tensor.raw_data):,}; copy it again, or export it again")


def stored_bytes(tensor: TensorProto) -> int:
    """What the data of a shape and type takes."""
    return -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)


def _require_no_recursion(functions: Iterable[FunctionProto], path: Path) -> None:
    calls = {(f.domain, f.name): [(n.domain, n.op_type) for n in _under(f.node)] for f in functions}
    done = set[tuple[str, str]]()
    for start in calls:
        _follow(start, calls, done, (), path)


def _follow(
    name: tuple[str, str],
    calls: dict[tuple[str, str], list[tuple[str, str]]],
    done: set[tuple[str, str]],
    above: tuple[tuple[str, str], ...],
    path: Path,
) -> None:
    if name in above:
        raise ModelError(f"{path}: the function {name[1]!r} calls itself; export the model without functions")
    if name in done or name not in calls:
        return
    for other in calls[name]:
        _follow(other, calls, done, (*above, name), path)
    done.add(name)


def _nodes(proto: ModelProto) -> Iterator[NodeProto]:
    yield from _under(proto.graph.node)
    for function in proto.functions:
        yield from _under(function.node)


def _under(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of the graphs in them."""
    for node in nodes:
        yield node
        for graph in bodies(node):
            yield from _under(graph.node)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
