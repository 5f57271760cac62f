"""Attention blocks of an ONNX graph: scores MatMul -> ... -> Softmax -> ... -> MatMul with the values."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from qcompile.target.view import DEQUANTIZE_OPS, MOVEMENT_OPS, QUANTIZE_OPS, GraphView

PASS_THROUGH = MOVEMENT_OPS | QUANTIZE_OPS | DEQUANTIZE_OPS | {"Dropout"}
SCORE_OPS = PASS_THROUGH | frozenset(["Mul", "Div", "Add", "Sub", "Where", "Clip", "Max", "Min", "Tanh"])
MAX_STEPS = 12


@dataclass(frozen=True)
class AttentionBlock:
    """Names of the nodes Q K^T, softmax and P V; an ONNX `Attention` node is all three."""

    scores: str
    softmax: str
    values: str


def attention_blocks(view: GraphView) -> list[AttentionBlock]:
    """The blocks of the top-level graph, in graph order of their softmax."""
    native = [AttentionBlock(n.name, n.name, n.name) for n in view.of_type("Attention")]
    found = (_block(view, softmax) for softmax in view.of_type("Softmax"))
    return [*native, *(b for b in found if b is not None)]


def _block(view: GraphView, softmax: NodeProto) -> AttentionBlock | None:
    scores = _upstream(view, softmax.input[0], MAX_STEPS)
    values = _downstream(view, softmax.output[0], MAX_STEPS)
    if scores is None or values is None:
        return None
    return AttentionBlock(scores.name, softmax.name, values.name)


def _upstream(view: GraphView, name: str, steps: int) -> NodeProto | None:
    node = view.producer.get(name)
    if node is None or steps == 0:
        return None
    if node.op_type == "MatMul":
        return None if view.is_constant(node.input[1]) else node
    if node.op_type not in SCORE_OPS:
        return None
    inputs = node.input[:1] if node.op_type in PASS_THROUGH else node.input
    return next((hit for x in inputs if (hit := _upstream(view, x, steps - 1)) is not None), None)


def _downstream(view: GraphView, name: str, steps: int) -> NodeProto | None:
    for node, slot in view.consumers.get(name, []) if steps else []:
        if node.op_type == "MatMul" and not view.is_constant(node.input[1 - slot]):
            return node
        hit = _downstream(view, node.output[0], steps - 1) if node.op_type in PASS_THROUGH and slot == 0 else None
        if hit is not None:
            return hit
    return None
