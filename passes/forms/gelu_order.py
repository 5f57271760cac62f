"""gelu-order: the factors of an Erf GELU in the order that runtimes fuse."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import fresh_name
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage


@dataclass(frozen=True)
class GeluOrder(Pass):
    """Multiply by x first and by 0.5 last, so that ONNX Runtime fuses the five nodes into one.

    before: x * (0.5 * (1 + Erf(x / sqrt 2)))     after: (x * (1 + Erf(x / sqrt 2))) * 0.5
    The left order is what PyTorch's dynamo exporter writes.
    """

    name = "gelu-order"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Reorder every site; the inner product's value changes, the GELU's does not."""
        changed = [_reorder(model.graph, node, ctx) for node in list(model.graph) if is_op(node, "Erf")]
        return PassResult(any(changed), Changes(moved={name for name in changed if name}))


def _reorder(graph: ir.Graph, erf: ir.Node, ctx: PassContext) -> str:
    """The name of the inner product, whose values changed; empty when nothing did."""
    add = _only_reader(erf, "Add")
    inner = _only_reader(add, "Mul") if add is not None else None
    outer = _only_reader(inner, "Mul") if inner is not None else None
    if add is None or inner is None or outer is None:
        return ""
    half = _slot_of_half(inner)
    x_slot = 0 if outer.inputs[1] is inner.outputs[0] else 1
    x = outer.inputs[x_slot]
    if half is None or x is None or x not in _argument(erf):
        return ""
    constant = inner.inputs[half]
    inner.replace_input_with(half, x)
    outer.replace_input_with(x_slot, constant)
    inner.outputs[0].name = fresh_name(graph, f"{inner.outputs[0].name}_times_x")
    ctx.remarks.applied(str(outer.name), "GELU: times x first, times 0.5 last")
    return str(inner.outputs[0].name)


def _argument(erf: ir.Node) -> list[ir.Value | None]:
    """What is divided by sqrt 2 on the way into Erf."""
    producer = erf.inputs[0].producer() if erf.inputs[0] is not None else None
    return list(producer.inputs) if producer is not None and is_op(producer, "Div", "Mul") else []


def _slot_of_half(node: ir.Node) -> int | None:
    for slot, value in enumerate(node.inputs):
        array = const_array(value) if value is not None else None
        if array is not None and array.size == 1 and float(array.reshape(-1)[0]) == 0.5:
            return slot
    return None


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or not is_op(uses[0][0], op_type):
        return None
    return uses[0][0]
