"""A stable text form of a graph, for goldens and --print-after: one line a node, constants summarised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.model import Model
from qcompile.report import escaped

_SMALL = 8


def print_model(
    model: Model,
    notes: Callable[[ir.Node], Iterable[str]] = lambda _: (),
    constant: Callable[[ir.Value], str] | None = None,
) -> str:
    """The main graph as text; equal models print equally, weights show shape, range and mean square.

    `notes` says more about a node, one line each (`decide.decisions.lines`: how it is quantized); `constant` spells an operand
    that is a constant, where a reader knows its weights by another form.
    """
    spelled = constant or summary
    graph = model.graph
    interface = [", ".join(_typed(v) for v in values) for values in (graph.inputs, graph.outputs)]
    lines = [f"graph opset={model.opset} ({interface[0]}) -> ({interface[1]})"]
    for node in graph:
        lines.append("  " + _node(node, spelled))
        lines.extend("      " + line for line in notes(node))
    return "\n".join(lines) + "\n"


def _node(node: ir.Node, constant: Callable[[ir.Value], str]) -> str:
    outs = ", ".join(escaped(v.name or "-") for v in node.outputs)
    ins = ", ".join(_operand(v, constant) for v in node.inputs)
    attrs = " ".join(f"{a.name}={_attr(a)}" for a in sorted(node.attributes.values(), key=lambda a: a.name))
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{outs} = {op}({ins})" + (f" {{{attrs}}}" if attrs else "") + f" @{escaped(str(node.name))}"


def _operand(value: ir.Value | None, constant: Callable[[ir.Value], str]) -> str:
    if value is None:
        return "-"
    return escaped(str(value.name)) if value.const_value is None else constant(value)


def summary(value: ir.Value) -> str:
    """A constant as const<dtype[shape]: ...>: its numbers if they are few, else their range and root mean square."""
    assert value.const_value is not None
    return _summary(value.const_value.numpy())


def _summary(array: NDArray[Any]) -> str:
    if array.dtype.kind in "OSU":
        return f"const<string{list(array.shape)}>"
    if array.size <= _SMALL:
        numbers = ", ".join(f"{x:.6g}" for x in array.astype(np.float64).ravel())
        return f"const<{array.dtype}{list(array.shape)}: {numbers}>"
    wide = array.astype(np.float64)
    rms = np.sqrt((wide**2).mean())
    return f"const<{array.dtype}{list(array.shape)}: min {wide.min():.6g} max {wide.max():.6g} rms {rms:.6g}>"


def _attr(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        return _summary(attr.as_tensor().numpy())
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    value = attr.value
    return f"{value:.6g}" if isinstance(value, float) else escaped(str(value))


def _typed(value: ir.Value) -> str:
    return f"{escaped(str(value.name))}: {value.dtype}{value.shape if value.shape is not None else ''}"
