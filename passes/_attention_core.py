"""MatMul -> (scale, mask) -> Softmax -> MatMul: the two matrix products of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir.ops import is_const, is_op

_UP = ("Add", "Sub", "Mul", "Div", "Where", "Reshape", "Transpose", "Cast", "Clip", "Max", "Identity", "Squeeze", "Unsqueeze")
_DOWN = ("Reshape", "Transpose", "Cast", "Dropout", "Identity", "Mul", "Where", "Squeeze", "Unsqueeze", "Add")


@dataclass(frozen=True)
class AttentionCore:
    """`scores` = q k^T, `softmax`, and `values` = p v, whose input `probability_slot` is p."""

    scores: ir.Node
    softmax: ir.Node
    values: ir.Node
    probability_slot: int


def attention_cores(graph: ir.Graph) -> Iterator[AttentionCore]:
    """Every attention of the graph, in node order; products with a constant operand are not attention."""
    for node in graph:
        if is_op(node, "Softmax"):
            scores, values = _up(node), _down(node)
            if scores is not None and values is not None:
                yield AttentionCore(scores, node, values[0], values[1])


def _product(node: ir.Node | None) -> bool:
    return node is not None and is_op(node, "MatMul") and not any(is_const(v) for v in node.inputs)


def _up(softmax: ir.Node) -> ir.Node | None:
    value = softmax.inputs[0]
    for _ in range(12):
        producer = value.producer() if value is not None else None
        if producer is None or _product(producer):
            return producer
        if not is_op(producer, *_UP):
            return None
        value = _data_input(producer)
    return None


def _data_input(node: ir.Node) -> ir.Value | None:
    """The operand that is computed from scores: for Add and friends the one that is not a constant or mask."""
    if is_op(node, "Where"):
        return node.inputs[1] if not is_const(node.inputs[1]) else node.inputs[2]
    computed = [v for v in node.inputs if v is not None and not is_const(v)]
    if len(computed) < 2:
        return computed[0] if computed else None
    return next((v for v in computed if _reaches_product(v)), computed[0])


def _reaches_product(value: ir.Value) -> bool:
    for _ in range(6):
        producer = value.producer()
        if producer is None or _product(producer):
            return producer is not None
        if not is_op(producer, *_UP) or not producer.inputs or producer.inputs[0] is None:
            return False
        value = producer.inputs[0]
    return False


def _down(softmax: ir.Node) -> tuple[ir.Node, int] | None:
    value = softmax.outputs[0]
    for _ in range(8):
        uses = list(value.uses())
        products = [(n, i) for n, i in uses if _product(n)]
        if products:
            return products[0]
        step = next((n for n, _ in uses if is_op(n, *_DOWN)), None)
        if step is None:
            return None
        value = step.outputs[0]
    return None
