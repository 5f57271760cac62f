"""Residual streams: the values that blocks read through norms and write through Adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.core import Matches, Refusal, data_uses, is_channel_vector, once, only_use
from qcompile.structure.linear import Linear, linears_by_output
from qcompile.structure.norm import Norm, find_norms

_MAX_STEPS = 24


@dataclass(frozen=True)
class ResidualStream:
    """One chain of residual Adds.

    `values` are the stream's tensors, first the one that enters the first Add; `writers` the linears whose (scaled, moved)
    output an Add writes, `readers` the norms of stream values, `others` all other nodes that read one.  Readers and others may
    stand behind data movement.
    """

    values: tuple[ir.Value, ...]
    adds: tuple[ir.Node, ...]
    writers: tuple[Linear, ...]
    readers: tuple[Norm, ...]
    others: tuple[ir.Node, ...]


@dataclass
class _Chain:
    values: list[ir.Value] = field(default_factory=list[ir.Value])
    adds: list[ir.Node] = field(default_factory=list[ir.Node])
    writers: list[Linear] = field(default_factory=list[Linear])


@once
def find_residual_streams(graph: ir.Graph) -> Matches[ResidualStream]:
    """All chains of Adds of a stream value and a linear's output; Adds of two computed values without one are refused."""
    linears = linears_by_output(graph)
    chains: list[_Chain] = []
    chain_of: dict[ir.Value, _Chain] = {}
    refused: list[Refusal] = []
    for node in graph:
        if not ops.is_op(node, "Add") or any(ops.is_const(v) for v in node.inputs):
            continue
        sides = _sides(node, linears)
        if sides is None:
            refused.append(Refusal(node, "neither operand is written by a linear"))
            continue
        stream, writers = sides
        if stream is not None:
            _extend(stream, node, writers, chains, chain_of)
    norm_of = {part: norm for norm in find_norms(graph) for part in norm.nodes}
    return Matches(tuple(_stream(chain, norm_of) for chain in chains), tuple(refused))


def _sides(add: ir.Node, linears: dict[ir.Value, Linear]) -> tuple[ir.Value | None, tuple[Linear, ...]] | None:
    """(stream operand, linears that write the other one); the stream is None when both operands are written by linears."""
    first, second = add.inputs[0], add.inputs[1]
    if first is None or second is None:
        return None
    by_first, by_second = _writers(first, linears), _writers(second, linears)
    if by_first and by_second:
        return None, by_first + by_second
    if by_first or by_second:
        return (second, by_first) if by_first else (first, by_second)
    return None


def _writers(value: ir.Value, linears: dict[ir.Value, Linear]) -> tuple[Linear, ...]:
    """The linears that alone make `value`, through movement, LayerScale and sums of branches; empty if something else does."""
    for _ in range(_MAX_STEPS):
        if only_use(value) is None and not _is_rolled(value):
            return ()
        if value in linears:
            return (linears[value],)
        node = value.producer()
        if node is None:
            return ()
        if ops.is_op(node, "Add") and not any(ops.is_const(v) for v in node.inputs):
            sides = _sides(node, linears)
            return sides[1] if sides is not None and sides[0] is None else ()
        behind = _behind(node)
        if behind is None:
            return ()
        value = behind
    return ()


def _is_rolled(value: ir.Value) -> bool:
    """True if only the two Slices of a cyclic roll read `value`."""
    users = {node for node, _ in data_uses(value)}
    joins = {user for node in users for user, _ in node.outputs[0].uses() if ops.is_op(node, "Slice")}
    return not value.is_graph_output() and len(joins) == 1 and all(_roll_source(join) is value for join in joins)


def _roll_source(concat: ir.Node) -> ir.Value | None:
    """x of Concat(x[k:], x[:k])."""
    slices = [None if v is None else v.producer() for v in concat.inputs]
    sources = {node.inputs[0] if node is not None and ops.is_op(node, "Slice") else None for node in slices}
    return sources.pop() if ops.is_op(concat, "Concat") and len(sources) == 1 else None


def _behind(node: ir.Node) -> ir.Value | None:
    if ops.is_op(node, "Concat"):
        return _roll_source(node)
    if ops.is_data_movement(node) or ops.is_op(node, "Cast"):
        return node.inputs[0]
    if ops.is_op(node, "Mul", "Div"):
        for slot in range(2):
            if is_scaling(node, slot) or is_channel_vector(node.inputs[1 - slot]):
                return node.inputs[slot]
    return None


def _extend(
    stream: ir.Value, add: ir.Node, writers: tuple[Linear, ...], chains: list[_Chain], chain_of: dict[ir.Value, _Chain]
) -> None:
    chain = _known_chain(stream, chain_of)
    if chain is None:
        chain = _Chain([stream])
        chains.append(chain)
        chain_of[stream] = chain
    elif stream not in chain_of:
        chain.values.append(stream)
        chain_of[stream] = chain
    chain.values.append(add.outputs[0])
    chain.adds.append(add)
    chain.writers.extend(writers)
    chain_of[add.outputs[0]] = chain


def _known_chain(value: ir.Value, chain_of: dict[ir.Value, _Chain]) -> _Chain | None:
    """The chain that `value` belongs to, directly or through movement with one data input."""
    for _ in range(_MAX_STEPS):
        if value in chain_of:
            return chain_of[value]
        node = value.producer()
        behind = None if node is None or not (ops.is_data_movement(node) or ops.is_op(node, "Cast")) else _behind(node)
        if behind is None:
            return None
        value = behind
    return None


def _users(values: list[ir.Value]) -> dict[ir.Node, None]:
    """The nodes that compute with stream values, directly or behind movement."""
    users: dict[ir.Node, None] = {}
    queue, seen = list(values), set(values)
    while queue:
        for user, _ in data_uses(queue.pop(0)):
            if ops.is_data_movement(user) or ops.is_op(user, "Cast"):
                queue.extend(out for out in user.outputs if out not in seen)
                seen.update(user.outputs)
            else:
                users[user] = None
    return users


def _stream(chain: _Chain, norm_of: dict[ir.Node, Norm]) -> ResidualStream:
    users = _users(chain.values)
    own = set(chain.adds)
    readers = dict.fromkeys(norm_of[u] for u in users if u in norm_of)
    others = tuple(u for u in users if u not in norm_of and u not in own)
    return ResidualStream(tuple(chain.values), tuple(chain.adds), tuple(chain.writers), tuple(readers), others)
