"""Around a Softmax: the Q K MatMul in front of it and the P V MatMul behind it.

Placement looks at onnx_ir graphs, rules and audit at protobuf graphs: both walk here, each with its own `Wiring`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.optable import ops_with
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.core import Refusal

N = TypeVar("N")
V = TypeVar("V")

_QUANTIZE = frozenset({"QuantizeLinear", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize"})
_DEQUANTIZE = frozenset({"DequantizeLinear", "TRT_MXFP8DequantizeLinear"})
_CHANGES = ops_with("arithmetic") - {"Pow"} | ops_with("picks") | {"Clip", "Tanh"}
_COPIES = ops_with("copies") | ops_with("reshapes") - {"Flatten"} | {"Cast"} | _QUANTIZE | _DEQUANTIZE
_COPIES_BEHIND = _COPIES | {"Transpose"}  # in front of the softmax it would move the axis that is summed over
_KEEPS_CONSTANT = ops.MOVEMENT_OPS | _QUANTIZE | _DEQUANTIZE | {"Cast"}
_MAX_VISITS = 64


class Wiring(Protocol[N, V]):
    """What the walk asks a graph with nodes N and tensors V."""

    def op(self, node: N) -> str:
        """The operator, "" for one of a domain that is not known here."""
        ...

    def inputs(self, node: N) -> Sequence[V | None]:
        """The inputs, None for one that is left out."""
        ...

    def output(self, node: N) -> V:
        """The first output."""
        ...

    def producer(self, value: V) -> N | None:
        """The node that makes `value`."""
        ...

    def uses(self, value: V) -> Iterable[tuple[N, int]]:
        """The nodes that read `value`, and in which slot."""
        ...

    def is_stored(self, value: V) -> bool:
        """Whether `value` is an initializer or the value of a Constant node."""
        ...


@dataclass(frozen=True)
class Scores(Generic[N]):
    """`matmul` is Q K^T; `between` the nodes from it to the softmax, in order."""

    matmul: N
    between: tuple[N, ...]


@dataclass(frozen=True)
class Values(Generic[N]):
    """`matmul` is P V and reads V at `slot`; `changed` are the nodes that alter the probabilities (rows need not sum to 1)."""

    matmul: N
    slot: int
    changed: tuple[N, ...]


def scores_in_front(graph: Wiring[N, V], softmax: N) -> Scores[N] | None:
    """The first MatMul of two computed values (or Einsum) behind the softmax's input; None if there is none (a classifier)."""
    stack: list[tuple[V | None, tuple[N, ...]]] = [(graph.inputs(softmax)[0], ())]
    for _ in range(_MAX_VISITS):
        if not stack:
            break
        value, between = stack.pop()
        node = None if value is None else graph.producer(value)
        if node is None:
            continue
        if graph.op(node) == "Einsum" or _is_product(graph, node):
            return Scores(node, between)
        if graph.op(node) in _COPIES | _CHANGES:
            read = graph.inputs(node)[:1] if graph.op(node) in _COPIES else graph.inputs(node)
            stack.extend((v, (node, *between)) for v in reversed(read))
    return None


def values_behind(graph: Wiring[N, V], softmax: N) -> Values[N] | None:
    """The one MatMul that multiplies the probabilities with computed values; None if there is none or more than one."""
    queue: deque[tuple[V, tuple[N, ...]]] = deque([(graph.output(softmax), ())])
    ends: list[Values[N]] = []
    for _ in range(_MAX_VISITS):
        if not queue:
            break
        value, changed = queue.popleft()
        for node, slot in graph.uses(value):
            if _is_product(graph, node):
                ends.append(Values(node, 1 - slot, changed))
            elif graph.op(node) in _CHANGES:
                queue.append((graph.output(node), (*changed, node)))
            elif graph.op(node) in _COPIES_BEHIND and slot == 0:
                queue.append((graph.output(node), changed))
    return ends[0] if len(ends) == 1 else None


def _is_product(graph: Wiring[N, V], node: N) -> bool:
    """True for a MatMul of two computed values."""
    return graph.op(node) == "MatMul" and not any(_is_constant(graph, v) for v in graph.inputs(node))


def _is_constant(graph: Wiring[N, V], value: V | None) -> bool:
    """Whether `value` is stored, or moved, cast and quantized from stored values only."""
    if value is None or graph.is_stored(value):
        return True
    node = graph.producer(value)
    return node is not None and graph.op(node) in _KEEPS_CONSTANT and all(_is_constant(graph, v) for v in graph.inputs(node))


class _IrWiring:
    def op(self, node: ir.Node) -> str:
        return node.op_type if node.domain in ("", "trt") else ""

    def inputs(self, node: ir.Node) -> Sequence[ir.Value | None]:
        return node.inputs

    def output(self, node: ir.Node) -> ir.Value:
        return node.outputs[0]

    def producer(self, value: ir.Value) -> ir.Node | None:
        return value.producer()

    def uses(self, value: ir.Value) -> Iterable[tuple[ir.Node, int]]:
        return value.uses()

    def is_stored(self, value: ir.Value) -> bool:
        return ops.is_const(value)


_IR: Wiring[ir.Node, ir.Value] = _IrWiring()


def find_scores(softmax: ir.Node) -> Scores[ir.Node] | Refusal | None:
    """`scores_in_front` of an onnx_ir node; an Einsum is refused."""
    scores = scores_in_front(_IR, softmax)
    if scores is not None and ops.is_op(scores.matmul, "Einsum"):
        return Refusal(softmax, f"its scores are made by Einsum {scores.matmul.name}: decompose it first")
    return scores


def find_values(softmax: ir.Node) -> Values[ir.Node] | None:
    """`values_behind` an onnx_ir node."""
    return values_behind(_IR, softmax)


def scaling_nodes(nodes: tuple[ir.Node, ...]) -> tuple[ir.Node, ...]:
    """The Mul and Div by one number among `nodes`."""
    return tuple(n for n in nodes if any(is_scaling(n, slot) for slot in range(min(2, len(n.inputs)))))
