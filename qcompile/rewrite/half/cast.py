"""Convert the chosen nodes to a 16-bit type and put one Cast where the precisions meet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, bypass, drop_if_unused, insert_after, new_node, redirect, swap_output
from qcompile.ir.ops import is_op
from qcompile.rewrite.half.slots import takes
from qcompile.rewrite.half.types import FLOAT, Narrow, is_float

_PRECISION = 23  # the opset from which x / scale takes the type of the scale where nothing is said: 1 % of the codes is one off


@dataclass(frozen=True)
class _Chosen:
    """The nodes that become narrow: their slots that may."""

    nodes: frozenset[int]
    fmt: Narrow
    opsets: Mapping[str, int]

    def wants(self, node: ir.Node, slot: int) -> bool:
        return id(node) in self.nodes and takes(node, slot, self.fmt, self.opsets)


def convert(graph: ir.Graph, nodes: Iterable[ir.Node], fmt: Narrow, masks: Collection[ir.Value]) -> None:
    """Give `nodes` the type of `fmt` as far as their schemas allow; constants in `masks` end at its safe range.

    Tensors that had another type than float32 before are left alone.
    """
    half = list(nodes)
    chosen = _Chosen(frozenset(id(node) for node in half), fmt, graph.opset_imports)
    constants = [v for v in graph.initializers.values() if is_float(v)]
    computed = [v for v in [*graph.inputs, *(v for n in graph for v in n.outputs)] if is_float(v)]
    for node in half:
        _convert(node, chosen, masks)
    for value in constants:
        _meet_constant(graph, value, chosen, -fmt.safe if value in masks else None)
    for value in computed:
        _meet_value(graph, value, chosen)
    for node in half:
        if is_op(node, "Cast") and node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype:
            bypass(graph, node)


def _convert(node: ir.Node, chosen: _Chosen, masks: Collection[ir.Value]) -> None:
    """Attributes and output types of one node; its inputs are cast where they meet."""
    fmt = chosen.fmt
    low = -fmt.safe if node.outputs and node.outputs[0] in masks else None
    for i, out in enumerate(node.outputs):
        if is_float(out) and chosen.wants(node, ~i):
            out.type = ir.TensorType(fmt.dtype)
    for name in ("to", "output_dtype", "dtype"):
        if name in node.attributes and node.attributes[name].as_int() == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(fmt.dtype))
    if node.op_type == "ConstantOfShape":
        _fill(node, fmt, low)
    if is_op(node, "QuantizeLinear") and chosen.opsets.get("", 0) >= _PRECISION and "precision" not in node.attributes:
        node.attributes["precision"] = ir.AttrInt64("precision", int(FLOAT))


def _fill(node: ir.Node, fmt: Narrow, low: float | None) -> None:
    attribute = node.attributes.get("value")
    array = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
    if array.dtype == np.float32:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fmt.round(array, low)))


def _meet_constant(graph: ir.Graph, value: ir.Value, chosen: _Chosen, low: float | None) -> None:
    uses, fmt = [(n, i) for n, i in value.uses() if chosen.wants(n, i)], chosen.fmt
    if uses and value.const_value is not None:
        suffix = "fp16" if fmt.dtype == ir.DataType.FLOAT16 else "bf16"
        new = add_constant(graph, f"{value.name}_{suffix}", fmt.round(value.const_value.numpy(), low), fmt.dtype)
        redirect(value, new, uses)
        drop_if_unused(graph, value)


def _meet_value(graph: ir.Graph, value: ir.Value, chosen: _Chosen) -> None:
    """Readers in the other precision get one Cast; a graph output returns to float32."""
    fmt = chosen.fmt
    is_half = value.dtype == fmt.dtype
    others = [(n, i) for n, i in value.uses() if chosen.wants(n, i) != is_half and not n.op_type.startswith("Cast")]
    to = FLOAT if is_half else fmt.dtype
    output = value.is_graph_output() and is_half and value.producer() is not None
    if not others and not output:
        return
    cast = new_node(graph, "Cast", [value], name=f"{value.name}_to_{to.name.lower()}", attributes={"to": int(to)})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(to), value.shape
    insert_after(graph, value, cast)
    redirect(value, cast.outputs[0], others)
    if output:
        swap_output(graph, value, cast.outputs[0])
        value.type = ir.TensorType(fmt.dtype)
        cast.outputs[0].type = ir.TensorType(FLOAT)
