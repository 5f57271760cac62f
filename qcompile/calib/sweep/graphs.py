"""The verbs that put reductions into a graph: append a node whose output leaves the session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.model import Model


def named_values(model: Model) -> dict[str, ir.Value]:
    """Every value of the main graph by name."""
    graph = model.graph
    named = {str(v.name): v for v in (*graph.inputs, *graph.initializers.values())}
    return named | {str(v.name): v for node in graph for v in node.outputs}


def expose(model: Model, value: ir.Value) -> str:
    """Make a tensor an output; inputs and initializers cannot be outputs themselves and get a new name."""
    if value.producer() is None:
        value = append(model, "Identity", [value], f"qcompile_raw_{len(model.graph.outputs)}")
    model.graph.outputs.append(value)
    return str(value.name)


def reduce(model: Model, op: str, value: ir.Value, axes: Sequence[int], name: str) -> ir.Value:
    """One Reduce node; its axes are an input from opset 18 on (13 for ReduceSum), an attribute before."""
    if not axes:  # nothing to reduce: a vector, observed per element
        return append(model, "Mul" if op == "ReduceSumSquare" else "Identity", [value] * (1 + (op == "ReduceSumSquare")), name)
    if model.opset >= (13 if op == "ReduceSum" else 18):
        return append(model, op, [value, constant(model, np.array(axes, np.int64), f"{name}_axes")], name, keepdims=0)
    return append(model, op, [value], name, keepdims=0, axes=list(axes))


def cast(model: Model, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """The value in another element type."""
    return value if value.dtype == dtype else append(model, "Cast", [value], name, dtype=dtype, to=int(dtype))


def append(
    model: Model, op: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType | None = None, **attributes: Any
) -> ir.Value:
    """A node right behind the first input's; its output has the node's name and, by default, the first input's element type.

    ONNX Runtime's time to order the nodes grows with those that wait: thousands at the end of a graph cost it minutes.
    """
    node, producer = ir.node(op, list(inputs), attributes, num_outputs=1, name=name), inputs[0].producer()
    out = node.outputs[0]
    out.name, out.type = name, inputs[0].type if dtype is None else ir.TensorType(dtype)
    if producer is None:
        model.graph.append(node)
    else:
        model.graph.insert_after(producer, node)
    return out


def constant(model: Model, array: NDArray[Any], name: str) -> ir.Value:
    """An initializer."""
    value = ir.val(name, const_value=ir.Tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
