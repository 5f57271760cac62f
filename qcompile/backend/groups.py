"""Q/DQ groups of a model, and the model with some of them taken out.

A group is the smallest part that can be put back into float without leaving an operator half quantized: all
DequantizeLinear readers of one quantizer, joined with those that share a compute node with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qcompile.target.view import DEQUANTIZE_OPS, MOVEMENT_OPS, QUANTIZE_OPS, GraphView, attribute

QDQ = QUANTIZE_OPS | DEQUANTIZE_OPS
Array = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """`nodes` compute on what the pairs dequantize; `pairs` are the names of the QuantizeLinear and DequantizeLinear nodes."""

    nodes: tuple[str, ...]
    pairs: frozenset[str]

    def __contains__(self, name: str) -> bool:
        """Whether a node of this name belongs to the group."""
        return name in self.pairs or name in self.nodes


def qdq_groups(view: GraphView) -> tuple[Group, ...]:
    """The groups in graph order.  Node names must be unique.

    A DequantizeLinear that reads a graph input cannot be taken out and belongs to no group.
    """
    links = {dq.name: _links(view, dq) for dq in view.of_type(*DEQUANTIZE_OPS) if _has_source(view, dq)}
    order = {n.name: i for i, n in enumerate(view.nodes)}
    groups = [_group(view, members, links) for members in _components(links)]
    return tuple(sorted(groups, key=lambda g: min((order[n] for n in g.nodes), default=len(order))))


def _group(view: GraphView, members: set[str], links: dict[str, set[str]]) -> Group:
    types = {n.name: n.op_type for n in view.nodes}
    touched = set().union(*(links[dq] for dq in members)) | members
    pairs = frozenset(name for name in touched if types[name] in QDQ)
    return Group(tuple(n.name for n in view.nodes if n.name in touched and n.name not in pairs), pairs)


def _components(links: dict[str, set[str]]) -> list[set[str]]:
    """Connected components: two DQ belong together if they share a quantizer or a compute node."""
    found: list[tuple[set[str], set[str]]] = []
    for dq, names in links.items():
        joined = [c for c in found if c[1] & names]
        found = [c for c in found if not c[1] & names]
        found.append(({dq}.union(*(c[0] for c in joined)), names.union(*(c[1] for c in joined))))
    return [members for members, _ in found]


def _links(view: GraphView, dq: NodeProto) -> set[str]:
    """The names of the quantizers that `dq` reads and of the compute nodes that read it."""
    q = _quantizer(view, dq)
    readers = {n.name for n in _readers(view, dq.output[0]) if n.op_type not in QDQ}
    return readers | ({q.name} if q is not None else set())


def _readers(view: GraphView, name: str) -> Iterator[NodeProto]:
    """Nodes that read `name`, looking through data movement."""
    for node, slot in view.consumers.get(name, []):
        if node.op_type in MOVEMENT_OPS and slot == 0:
            for output in node.output:
                yield from _readers(view, output)
        else:
            yield node


def _quantizer(view: GraphView, dq: NodeProto) -> NodeProto | None:
    node = view.producer.get(view.origin(dq.input[0]))
    return node if node is not None and node.op_type in QUANTIZE_OPS else None


def _has_source(view: GraphView, dq: NodeProto) -> bool:
    return _quantizer(view, dq) is not None or _known(view, dq.output[0])


def without(view: GraphView, groups: Iterable[Group]) -> onnx.ModelProto:
    """A copy of the model with `groups` in float: Q becomes Identity, DQ a Cast to its output type, or its constant value.

    External data stays where it is (the copy refers to the same file names).
    """
    taken = frozenset[str]().union(*(g.pairs for g in groups))
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    del model.graph.node[:], model.graph.value_info[:]
    for node in view.nodes:
        if node.name not in taken:
            model.graph.node.append(node)
        elif (weight := _weight(view, node)) is not None:
            model.graph.initializer.append(weight)
        else:
            model.graph.node.append(_float_node(view, node))
    _drop_unused(model.graph)
    return model


def _weight(view: GraphView, node: NodeProto) -> TensorProto | None:
    """The float value of a DQ of constant codes."""
    if node.op_type not in DEQUANTIZE_OPS or _quantizer(view, node) is not None:
        return None
    value = constant_value(view, node.output[0])
    return None if value is None else numpy_helper.from_array(value, node.output[0])


def _float_node(view: GraphView, node: NodeProto) -> NodeProto:
    if node.op_type in QUANTIZE_OPS:
        return helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)
    return helper.make_node("Cast", [node.input[0]], [node.output[0]], name=node.name, to=_float_type(view, node))


def _float_type(view: GraphView, dq: NodeProto) -> int:
    """The output type of a DequantizeLinear: `output_dtype`, else its scale's type."""
    return int(attribute(dq, "output_dtype", 0)) or view.elem_types.get(dq.input[1], 0) or TensorProto.FLOAT


def _known(view: GraphView, name: str) -> bool:
    """Whether `constant_value` has an answer (nothing is read)."""
    node = view.producer.get(name)
    dequantizes = node is not None and node.op_type in DEQUANTIZE_OPS and all(_known(view, x) for x in node.input if x)
    return dequantizes or view.constant_proto(name) is not None


def constant_value(view: GraphView, name: str) -> Array | None:
    """The value of `name` if it is a constant or a DequantizeLinear of constants (scales may be dequantized themselves)."""
    value = view.constant(name)
    node = view.producer.get(name)
    if value is not None or node is None or node.op_type not in DEQUANTIZE_OPS:
        return value
    inputs = [constant_value(view, x) for x in node.input if x]
    known = [x for x in inputs if x is not None]
    if len(known) < len(inputs):
        return None
    out = helper.tensor_dtype_to_np_dtype(_float_type(view, node))
    return dequantized(known, int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))).astype(out)


def dequantized(inputs: Sequence[Array], axis: int, block: int) -> Array:
    """(codes - zero_point) * scale in float32.

    `inputs` are codes, scale and optionally the zero point; scale is a scalar, 1-D along `axis`, or the codes' shape
    divided by `block` along `axis`.
    """
    codes, *rest = (np.asarray(x).astype(np.float32) for x in inputs)
    scale, *zero = (_spread(x, codes, axis, block) for x in rest)
    return (codes - zero[0] if zero else codes) * scale


def _spread(x: Array, codes: Array, axis: int, block: int) -> Array:
    if block:
        return np.repeat(x, block, axis)[tuple(slice(n) for n in codes.shape)]
    if x.size == 1:
        return x.reshape(())
    return x.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on."""
    needed = {v.name for v in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_names_read(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    used = [t for t in graph.initializer if t.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)


def _names_read(node: NodeProto) -> Iterator[str]:
    """Names that `node` or the bodies in its attributes read."""
    yield from node.input
    bodies = (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    for inner in (n for body in bodies for n in body.node):
        yield from _names_read(inner)
