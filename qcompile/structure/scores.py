"""Around a Softmax: the Q K MatMul in front of it and the P V MatMul behind it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.core import Refusal

_SCORE_OPS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Clip", "Max", "Min", "Tanh", "Squeeze", "Unsqueeze"}
)
_COPIES = frozenset({"Identity", "Dropout", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_CHANGES = frozenset({"Mul", "Div", "Where", "Clip", "Add", "Sub"})
_MAX_VISITS = 64


@dataclass(frozen=True)
class Scores:
    """`matmul` is Q K^T; `between` the nodes from it to the softmax, in order."""

    matmul: ir.Node
    between: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Values:
    """`matmul` is P V and reads V at `slot`; `changed` are the nodes that alter the probabilities (rows need not sum to 1)."""

    matmul: ir.Node
    slot: int
    changed: tuple[ir.Node, ...]


def find_scores(softmax: ir.Node) -> Scores | Refusal | None:
    """The MatMul of two computed values behind the softmax's input; None if there is none (a classifier)."""
    stack: list[tuple[ir.Value | None, tuple[ir.Node, ...]]] = [(softmax.inputs[0], ())]
    for _ in range(_MAX_VISITS):
        if not stack:
            break
        value, between = stack.pop()
        node = None if value is None else value.producer()
        if node is None or node.domain:
            continue
        if node.op_type == "Einsum":
            return Refusal(softmax, f"its scores are made by Einsum {node.name}: decompose it first")
        if is_product(node):
            return Scores(node, between)
        if node.op_type in _SCORE_OPS:
            stack.extend((v, (node, *between)) for v in reversed(node.inputs))
    return None


def is_product(node: ir.Node) -> bool:
    """True for a MatMul of two computed values."""
    return ops.is_op(node, "MatMul") and not any(ops.is_const(v) for v in node.inputs)


def find_values(softmax: ir.Node) -> Values | None:
    """The one MatMul that multiplies the probabilities with computed values; None if there is none or more than one."""
    queue: deque[tuple[ir.Value, tuple[ir.Node, ...]]] = deque([(softmax.outputs[0], ())])
    ends: list[Values] = []
    for _ in range(_MAX_VISITS):
        if not queue:
            break
        value, changed = queue.popleft()
        for node, slot in value.uses():
            if is_product(node):
                ends.append(Values(node, 1 - slot, changed))
            elif node.domain == "" and node.op_type in _COPIES | _CHANGES:
                queue.append((node.outputs[0], (*changed, node) if node.op_type in _CHANGES else changed))
    return ends[0] if len(ends) == 1 else None


def scaling_nodes(nodes: tuple[ir.Node, ...]) -> tuple[ir.Node, ...]:
    """The Mul and Div by one number among `nodes`."""
    return tuple(n for n in nodes if any(is_scaling(n, slot) for slot in range(min(2, len(n.inputs)))))
