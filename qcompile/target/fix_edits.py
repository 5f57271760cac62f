"""The few edits that mechanical fixes are made of; they change the context's model in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from qcompile.target.findings import Context
from qcompile.target.view import DEQUANTIZE_OPS, QUANTIZE_OPS

Array = NDArray[np.generic]


def add_constant(c: Context, base: str, array: Array) -> str:
    """A new initializer called `base`, or `base_1` ... if that name is taken."""
    graph = c.view.model.graph
    taken = {t.name for t in graph.initializer} | {x for n in graph.node for x in (*n.input, *n.output)}
    name, i = base, 1
    while name in taken:
        name, i = f"{base}_{i}", i + 1
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
    return name


def pair_of(c: Context, dq: NodeProto) -> NodeProto | None:
    """The QuantizeLinear that makes the codes which `dq` reads."""
    node = c.view.producer.get(dq.input[0])
    return node if node is not None and node.op_type in QUANTIZE_OPS else None


def readers(c: Context, q: NodeProto) -> list[NodeProto]:
    """The DequantizeLinear nodes behind `q`."""
    return [n for n, slot in c.view.consumers.get(q.output[0], []) if n.op_type in DEQUANTIZE_OPS and slot == 0]


def rescale(c: Context, nodes: Iterable[NodeProto], scale: Array, zero_point: Array | None) -> None:
    """Give Q and DQ `nodes` a new scale and zero point (None: leave it), of one shape."""
    nodes = list(nodes)
    s = add_constant(c, f"{nodes[0].input[1]}_fixed", scale)
    z = None if zero_point is None else add_constant(c, f"{nodes[0].output[0]}_zero", zero_point)
    for node in nodes:
        node.input[1] = s
        if z is not None:
            del node.input[2:]
            node.input.append(z)


def drop_attributes(node: NodeProto, names: Sequence[str]) -> None:
    """Remove attributes of `node`."""
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def replace_uses(c: Context, old: str, new: str, only: NodeProto | None = None) -> None:
    """Let the consumers of `old` (or `only` one of them) read `new`; a graph output keeps its name through an Identity."""
    for node in c.view.model.graph.node if only is None else [only]:
        for slot, name in enumerate(node.input):
            if name == old:
                node.input[slot] = new


def unquantize(c: Context, consumer: NodeProto, slot: int) -> bool:
    """Let `consumer` read float values in `slot`: the quantizer's input, or the dequantized constant.

    The pair stays for its other consumers.  False where that cannot be said without copying data movement.
    """
    dq = c.view.dequantizer(consumer.input[slot])
    if dq is None or c.view.origin(consumer.input[slot]) != dq.output[0]:
        return False
    source = float_source(c, dq)
    if source is None:
        return False
    if consumer.input[slot] == dq.output[0]:
        consumer.input[slot] = source
        return True
    if not _leads_only_to(c, dq.output[0], consumer):
        return False
    replace_uses(c, dq.output[0], source)
    return True


def float_source(c: Context, dq: NodeProto) -> str | None:
    """The name of the float tensor that `dq` stands for: what was quantized, or a new initializer of dequantized codes."""
    q = pair_of(c, dq)
    if q is not None:
        return q.input[0]
    values = dequantized(c, dq)
    return None if values is None else add_constant(c, f"{dq.output[0]}_float", values)


def _leads_only_to(c: Context, name: str, consumer: NodeProto) -> bool:
    """Whether every path from `name` ends, through single data movements, at `consumer`."""
    uses = c.view.consumers.get(name, [])
    return bool(uses) and all(n is consumer or _leads_only_to(c, n.output[0], consumer) for n, _ in uses)


def dequantized(c: Context, dq: NodeProto) -> Array | None:
    """The values of a DequantizeLinear of constants, in its scale's type; None if they are not constant or blocked."""
    codes, scale = c.view.constant(dq.input[0]), c.view.constant(dq.input[1])
    if codes is None or scale is None or any(a.name == "block_size" and a.i for a in dq.attribute):
        return None
    zero = c.view.constant(dq.input[2]) if len(dq.input) > 2 and dq.input[2] else None
    axis = next((int(a.i) for a in dq.attribute if a.name == "axis"), 1)
    shifted = codes.astype(np.float64) - (0 if zero is None else along(zero.astype(np.float64), axis, codes.ndim))
    return (shifted * along(scale.astype(np.float64), axis, codes.ndim)).astype(scale.dtype)


def along(values: NDArray[np.float64], axis: int, rank: int) -> NDArray[np.float64]:
    """A scalar as it is; a list as numbers along `axis` of an array of `rank` axes."""
    if values.size == 1 or rank == 0:
        return values.reshape(())
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def prune(model: onnx.ModelProto) -> None:
    """Remove Q/DQ, data movement and initializers that nothing reads any more."""
    graph = model.graph
    while True:
        used = set(_used_names(graph)) | {o.name for o in graph.output}
        dead = [n for n in graph.node if n.op_type in QUANTIZE_OPS | DEQUANTIZE_OPS and not used & set(n.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [t for t in graph.initializer if t.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _used_names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for a in node.attribute:
            for inner in (*([a.g] if a.HasField("g") else []), *a.graphs):
                yield from _used_names(inner)
                yield from (o.name for o in inner.output)


def is_half(kind: int) -> bool:
    """Whether an ONNX element type is float16 or bfloat16."""
    return kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
