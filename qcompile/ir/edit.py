"""The few safe verbs that passes write with.  Constants are copied on write, always: exporters share equal ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.ir.model import Model
from qcompile.ir.spill import constant_tensor


def fresh_name(graph: ir.Graph, stem: str) -> str:
    """A value name that nothing in `graph` uses yet: `stem`, else `stem_1`, ..."""
    taken: set[str] = graph.meta.setdefault("qcompile.names", set())
    if not taken:
        taken.update(_value_names(graph))
    name, i = stem, 1
    while name in taken or name in graph.initializers:
        name, i = f"{stem}_{i}", i + 1
    taken.add(name)
    return name


def forget_names(graph: ir.Graph) -> None:
    """Names that only removed nodes had may be given again."""
    graph.meta.pop("qcompile.names", None)


def _value_names(graph: ir.Graph) -> Iterable[str]:
    yield from (str(v.name) for v in graph.inputs)
    for node in graph.all_nodes():
        yield from (str(v.name) for v in node.outputs)
        yield str(node.name)
    for body in graph.subgraphs():
        yield from (str(v.name) for v in body.inputs)
        yield from body.initializers


def add_constant(graph: ir.Graph, stem: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    """Register a new initializer under a fresh name; a large model's weights go to a scratch file."""
    name = fresh_name(graph, stem)
    tensor = constant_tensor(graph, np.ascontiguousarray(array) if array.ndim else array, name, dtype)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_constant(node: ir.Node, slot: int, array: NDArray[Any]) -> ir.Value:
    """Replace the constant that `node` reads at `slot` by `array`, cast to the dtype it had.

    Copy on write: another reader of the old constant keeps it.
    """
    old = node.inputs[slot]
    assert old is not None and node.graph is not None
    dtype = old.dtype.numpy() if old.dtype is not None else np.dtype(np.float32)
    new = add_constant(_root(node), f"{old.name}_q", np.asarray(array).astype(dtype), old.dtype)
    node.replace_input_with(slot, new)
    drop_if_unused(_root(node), old)
    return new


def _root(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def drop_if_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Forget an initializer that nothing reads any more."""
    if value.name in graph.initializers and not value.uses() and not value.is_graph_output():
        del graph.initializers[str(value.name)]


def new_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    like: ir.Value | None = None,
    attributes: dict[str, Any] | None = None,
    outputs: int = 1,
    domain: str = "",
) -> ir.Node:
    """A node outside of the order yet; its outputs get fresh names and, if given, the type and shape of `like`."""
    node = ir.node(op_type, list(inputs), attributes or {}, domain=domain, num_outputs=outputs, name=fresh_name(graph, name))
    for i, out in enumerate(node.outputs):
        out.name = fresh_name(graph, f"{name}_out" if outputs == 1 else f"{name}_out{i}")
        if like is not None:
            out.type, out.shape = like.type, like.shape.copy() if like.shape is not None else None
    return node


def insert_after(graph: ir.Graph, value: ir.Value, *nodes: ir.Node) -> None:
    """Put `nodes` into the order right behind the producer of `value` (at the front for inputs and constants)."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph.node(0), nodes)


def redirect(value: ir.Value, new: ir.Value, uses: Iterable[tuple[ir.Node, int]]) -> None:
    """Let `uses` read `new` instead of `value`."""
    for node, slot in list(uses):
        node.replace_input_with(slot, new)


def splice_after(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Insert `node` (which reads `value`) behind it, and let every other reader read the node's output.

    A graph output keeps its name: the producer's value is renamed instead.  A graph input that is also an output
    is passed through as it is.
    """
    uses = [(n, i) for n, i in value.uses() if n is not node]
    insert_after(graph, value, node)
    redirect(value, node.outputs[0], uses)
    if value.is_graph_output() and not value.is_graph_input():
        swap_output(graph, value, node.outputs[0])


def swap_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph output that `old` was, under the same name; `old` gets another one."""
    name = old.name
    old.name = fresh_name(graph, f"{name}_pre")
    new.name = name
    new.type, new.shape = old.type, old.shape
    for i, out in enumerate(graph.outputs):
        if out is old:
            graph.outputs[i] = new


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` (and the graph's interface) use `new`; an output keeps its name."""
    redirect(old, new, list(old.uses()))
    if old.is_graph_output():
        swap_output(graph, old, new)


def bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Let the readers of `node`, which hands on its first input as it is, read that instead, and the node go.

    It stays where the graph's interface needs it: between an input (an initializer, another output) and an output.
    """
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    if out.is_graph_output() and (source.is_graph_output() or source.producer() is None):
        return
    replace_value(graph, out, source)
    graph.remove(node, safe=True)


def erase(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node that nothing reads any more, and the initializers that it alone read."""
    inputs = [v for v in node.inputs if v is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        drop_if_unused(graph, value)


def erase_dead(model: Model) -> None:
    """Remove nodes and initializers that no output depends on."""
    RemoveUnusedNodesPass()(model.ir)


def sort(graph: ir.Graph) -> None:
    """Restore topological order."""
    graph.sort()
