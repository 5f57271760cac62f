"""Shapes and types by ONNX's own inference: from what operators do, never from what a file declares about their results."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from qcompile.ir.model import Model

_BIG = 1000  # bytes of a weight: a shape is never as long


def infer_shapes(model: Model) -> None:
    """Give values the types and shapes that inference finds; the others keep theirs.  Quiet where inference fails."""
    with _hollow(model.graph):
        proto = ir.to_proto(model.ir)
    try:
        found = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except Exception:  # the bindings throw as many classes as there are causes, and there is nothing to add to what is known
        return
    for graph, inferred in zip(model.ir.graphs(), found.graphs(), strict=True):
        _merge(graph, inferred)


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
                f"output {value.name!r} is declared as {list(shape)} and is {list(value.shape)}: the declaration was dropped"
            )
        else:
            value.shape = shape.copy()
    return wrong


def _agree(a: ir.Shape, b: ir.Shape) -> bool:
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True) if isinstance(x, int) and isinstance(y, int))


def _merge(graph: ir.Graph, inferred: ir.Graph) -> None:
    known = {v.name: v for n in inferred for v in n.outputs}
    for value in (v for n in graph for v in n.outputs):
        found = known.get(value.name)
        if found is None:
            continue
        if found.type is not None:
            value.type = found.type
        if found.shape is not None and isinstance(found.type, ir.TensorType | None):
            value.shape = found.shape


@contextmanager
def _hollow(graph: ir.Graph) -> Generator[None]:
    """Meanwhile the large weights are inputs without data."""
    inputs, weights = list(graph.inputs), list(graph.initializers.values())
    tensors = {v.name: v.const_value for v in weights}
    big = [v for v in weights if v.const_value is not None and v.const_value.nbytes > _BIG]
    for value in big:
        tensor = value.const_value
        assert tensor is not None
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        del graph.initializers[str(value.name)]
        value.const_value = None
    graph.inputs.extend(v for v in big if v not in inputs)
    try:
        yield
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.clear()
        for value in weights:
            value.const_value = tensors[value.name]
            graph.initializers.add(value)
