"""What every finder returns: the structures found, and the near misses with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import onnx_ir as ir

from qcompile.ir import ops

T = TypeVar("T")
_FOUND = "qcompile.found"

Site = tuple[ir.Node, int]
"""An input slot of a node: the place where a constant is edited."""


@dataclass(frozen=True)
class Refusal:
    """A candidate that is not legal; `reason` completes the sentence "skipped <node>: ..."."""

    node: ir.Node
    reason: str


@dataclass(frozen=True)
class Matches(Generic[T]):
    """Structures in graph order; iterates over `found`."""

    found: tuple[T, ...]
    refused: tuple[Refusal, ...] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def sorted_out(answers: Iterable[T | Refusal | None], refused: Iterable[Refusal] = ()) -> Matches[T]:
    """What a matcher answered, candidate after candidate; None is neither found nor refused.  `refused` go first."""
    found: list[T] = []
    near = list(refused)
    for answer in answers:
        if isinstance(answer, Refusal):
            near.append(answer)
        elif answer is not None:
            found.append(answer)
    return Matches(tuple(found), tuple(near))


def joined(several: Iterable[Matches[T]]) -> Matches[T]:
    """All structures in order, and all refusals."""
    parts = tuple(several)
    return Matches(tuple(m for part in parts for m in part.found), tuple(r for part in parts for r in part.refused))


@dataclass
class _Found:
    """What was found in one version of `graph`; a clone of the graph carries it along and does not believe it."""

    graph: ir.Graph
    answers: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any])


def keep_found(graph: ir.Graph, found: _Found | None = None) -> None:
    """From now on answers about `graph` are remembered, beside those of `found`, until `forget_found`."""
    graph.meta[_FOUND] = _held(graph) or found or _Found(graph)


def forget_found(graph: ir.Graph) -> _Found | None:
    """`graph` may change: no answer counts any more; they are handed out, to be kept again should it not have changed."""
    held = _held(graph)
    graph.meta.pop(_FOUND, None)
    return held


def _held(graph: ir.Graph) -> _Found | None:
    held = graph.meta.get(_FOUND)
    return held if isinstance(held, _Found) and held.graph is graph else None


def found_once(graph: ir.Graph, question: Hashable, answer: Callable[[], T]) -> T:
    """`answer()`, or what it was when it was asked before in this version of the graph."""
    held = _held(graph)
    if held is None:
        return answer()
    if question not in held.answers:
        held.answers[question] = answer()
    return cast("T", held.answers[question])


def once(find: Callable[[ir.Graph], T]) -> Callable[[ir.Graph], T]:
    """A finder that looks once at a graph that is known to stay as it is, and else once for all finders that it calls."""

    @functools.wraps(find)
    def finder(graph: ir.Graph) -> T:
        if _held(graph) is not None:
            return found_once(graph, find, lambda: find(graph))
        keep_found(graph)
        try:
            return found_once(graph, find, lambda: find(graph))
        finally:
            forget_found(graph)

    return finder


_SHAPE_READERS = frozenset({"Shape", "Size"})


def data_uses(value: ir.Value) -> tuple[Site, ...]:
    """Uses of `value` that read its elements, not only its shape."""
    return tuple((node, slot) for node, slot in value.uses() if node.domain or node.op_type not in _SHAPE_READERS)


def only_use(value: ir.Value) -> Site | None:
    """The single data use of `value` inside its own graph, or None when there are more, none, or it is a graph output."""
    uses = data_uses(value)
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, slot = uses[0]
    producer = value.producer()
    return (node, slot) if producer is None or node.graph is producer.graph else None


def only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node of the single use if it is one of `op_types`."""
    use = only_use(value)
    return use[0] if use is not None and ops.is_op(use[0], *op_types) else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not `value` (`value` itself when both are)."""
    first, second = node.inputs[0], node.inputs[1]
    return second if first is value else first


def is_channel_vector(value: ir.Value | None, channels: int | None = None) -> bool:
    """True for a constant of shape [C] or [1, ..., 1, C] (of `channels` elements, if given)."""
    shape = ops.static_shape(value) if ops.is_const(value) else None
    if not shape or any(dim != 1 for dim in shape[:-1]):
        return False
    return channels is None or shape[-1] == channels


def names_between(starts: Iterable[ir.Node], last: ir.Node, *barriers: str) -> Iterator[str]:
    """Outputs of all nodes from `starts` up to the inputs of `last` (a superset of what a fold between them moves).

    Behind the first node, nodes of the operator types `barriers` end the walk too.
    """
    seen: set[ir.Node] = set()
    front = list(starts)
    while front:
        node = front.pop()
        if node in seen or node is last or (seen and node.op_type in barriers):
            continue
        seen.add(node)
        yield from (str(v.name) for v in node.outputs)
        front += [n for v in node.outputs for n, _ in v.uses()]


def label(node: ir.Node) -> str:
    """`<op> <name>` for a reason."""
    return f"{node.op_type} {node.name}" if node.name else node.op_type
