"""Attention blocks of a protobuf graph, as `structure.scores` recognises them: what rules judge and the audit counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from qcompile.structure.scores import Scores, Values, scores_in_front, values_behind
from qcompile.target.view import GraphView

_DOMAINS = ("", "ai.onnx", "trt")


@dataclass(frozen=True)
class AttentionBlock:
    """The nodes Q K^T, softmax and P V."""

    scores: Scores[NodeProto]
    softmax: NodeProto
    values: Values[NodeProto]

    @property
    def products(self) -> tuple[NodeProto, NodeProto]:
        """Q K^T and P V."""
        return self.scores.matmul, self.values.matmul

    @property
    def operands(self) -> dict[str, tuple[NodeProto, int]]:
        """Where q, k, softmax and v are read: node and slot."""
        scores, values, v = self.scores.matmul, self.values.matmul, self.values.slot
        return {"q": (scores, 0), "k": (scores, 1), "softmax": (values, 1 - v), "v": (values, v)}


def attention_blocks(view: GraphView) -> Iterator[AttentionBlock]:
    """The blocks of the top-level graph, in graph order of their softmax."""
    for softmax in view.of_type("Softmax"):
        scores, values = scores_of(view, softmax), values_behind(_ProtoWiring(view), softmax)
        if scores is not None and values is not None:
            yield AttentionBlock(scores, softmax, values)


def attention_products(view: GraphView) -> list[frozenset[str]]:
    """Names of the two products of each block; an ONNX `Attention` node is a block and both its products."""
    native = [frozenset({n.name}) for n in view.of_type("Attention")]
    return [*native, *(frozenset(n.name for n in b.products) for b in attention_blocks(view))]


def scores_of(view: GraphView, softmax: NodeProto) -> Scores[NodeProto] | None:
    """The MatMul Q K^T in front of `softmax`, None where there is none."""
    scores = scores_in_front(_ProtoWiring(view), softmax)
    return None if scores is None or scores.matmul.op_type == "Einsum" else scores


@dataclass(frozen=True)
class _ProtoWiring:
    view: GraphView

    def op(self, node: NodeProto) -> str:
        return node.op_type if node.domain in _DOMAINS else ""

    def inputs(self, node: NodeProto) -> Sequence[str | None]:
        return [name or None for name in node.input]

    def output(self, node: NodeProto) -> str:
        return node.output[0]

    def producer(self, value: str) -> NodeProto | None:
        return self.view.producer.get(value)

    def uses(self, value: str) -> Iterable[tuple[NodeProto, int]]:
        return self.view.consumers.get(value, ())

    def is_stored(self, value: str) -> bool:
        return self.view.constant_proto(value) is not None
