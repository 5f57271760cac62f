"""Convert the chosen nodes to a 16-bit type and put one Cast where the precisions meet."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, drop_if_unused, insert_after, new_node, redirect, swap_output
from qcompile.rewrite.half.types import FLOAT, Narrow

_FLOAT_SLOTS = {"Resize": (1, 2), "Upsample": (1,)}


def convert(graph: ir.Graph, nodes: Iterable[ir.Node], fmt: Narrow, masks: Collection[ir.Value]) -> None:
    """Give `nodes` the type of `fmt`; constants in `masks` end at its safe range."""
    chosen = list(nodes)
    half = {id(node) for node in chosen}
    for node in chosen:
        _convert(node, fmt, masks)
    for value in list(graph.initializers.values()):
        if value.dtype == FLOAT:
            _meet_constant(graph, value, half, fmt, -fmt.safe if value in masks else None)
    for value in [*graph.inputs, *(v for n in list(graph) for v in n.outputs)]:
        if value.dtype in (FLOAT, fmt.dtype):
            _meet_value(graph, value, half, fmt)


def _convert(node: ir.Node, fmt: Narrow, masks: Collection[ir.Value]) -> None:
    """Attributes and output types of one node; its inputs are cast where they meet."""
    low = -fmt.safe if node.outputs and node.outputs[0] in masks else None
    for out in node.outputs:
        if out.dtype == FLOAT:
            out.type = ir.TensorType(fmt.dtype)
    for name in ("to", "output_dtype", "dtype"):
        if name in node.attributes and node.attributes[name].as_int() == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(fmt.dtype))
    if node.op_type == "ConstantOfShape":
        _fill(node, fmt, low)


def _fill(node: ir.Node, fmt: Narrow, low: float | None) -> None:
    attribute = node.attributes.get("value")
    array = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
    if array.dtype == np.float32:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fmt.round(array, low)))


def _wants_half(node: ir.Node, slot: int, half: set[int]) -> bool:
    return id(node) in half and slot not in _FLOAT_SLOTS.get(node.op_type, ())


def _meet_constant(graph: ir.Graph, value: ir.Value, half: set[int], fmt: Narrow, low: float | None) -> None:
    uses = [(n, i) for n, i in value.uses() if _wants_half(n, i, half)]
    if uses and value.const_value is not None:
        suffix = "fp16" if fmt.dtype == ir.DataType.FLOAT16 else "bf16"
        new = add_constant(graph, f"{value.name}_{suffix}", fmt.round(value.const_value.numpy(), low), fmt.dtype)
        redirect(value, new, uses)
        drop_if_unused(graph, value)


def _meet_value(graph: ir.Graph, value: ir.Value, half: set[int], fmt: Narrow) -> None:
    """Readers in the other precision get one Cast; a graph output returns to float32."""
    is_half = value.dtype == fmt.dtype
    others = [(n, i) for n, i in value.uses() if _wants_half(n, i, half) != is_half and not n.op_type.startswith("Cast")]
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
