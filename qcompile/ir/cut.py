"""Cut a graph into blocks where few activations cross: between the layers, where only the residual stream is alive."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf, prod

import onnx_ir as ir

from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model

_DYNAMIC = 64  # what a dimension of unknown length counts
_EARLIEST = 0.5  # a block is cut after this share of its limit at the earliest
BLOCK_NODES = 4096  # of a block at most: the time that ONNX Runtime takes to open a graph grows by more than its nodes


@dataclass(frozen=True)
class Block:
    """A part of a graph: `takes` are made by earlier blocks, `gives` are needed by later ones, `answers` are wanted."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]


def cut(model: Model, wanted: Iterable[tuple[str, ...]], limit: int) -> list[Block]:
    """The blocks, in order, that make all `wanted` tensors.

    Args:
        wanted: groups of tensors; a group is answered by the first block that has all of them.
        limit: bytes of weights that a block reads or dequantizes; only a node that takes more makes a larger one.

    No block has more than `BLOCK_NODES` nodes, constant ones apart, where the graph can be cut at all.
    """
    groups = list(dict.fromkeys(wanted))
    constant = _constant(model.graph)
    needed = _needed(model, {name for group in groups for name in group})
    order = [node for node in model.graph if node in needed and node not in constant]
    lives = _lives(order, groups)
    bounds = _bounds(_alive(lives, len(order)), [_weights(node, constant) for node in order], limit)
    return [_block(order, lives, groups, *span) for span in zip([0, *bounds], [*bounds, len(order)], strict=True)]


def computed_bytes(model: Model) -> int:
    """Bytes of what nodes compute from weights alone, as far as shapes are known: dequantized weights above all."""
    constant = _constant(model.graph)
    return sum(_computed(v) for node in constant if node.op_type != "Constant" for v in node.outputs)


def part(model: Model, block: Block) -> Model:
    """A model of `block`: its inputs are those of `model` and what it takes, its outputs what it gives and answers.

    Inputs that it does not need are left out, but where the inputs fix the samples of a run.  The first dimension of
    other inputs is unknown, so that every part makes the same batches.
    """
    named = {str(v.name): v for v in model.graph.inputs} | _made(model.graph)
    outputs = dict.fromkeys([*block.gives, *(name for group in block.answers for name in group if name in named)])
    values = [named[n] for n in outputs if named[n].producer() is not None] or [named[n] for n in outputs]
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    graph = ir.convenience.extract(model.graph, [*inputs, *(named[n] for n in block.takes)], values)
    made = Model(_like(model.ir, graph), model.path)
    answered = {name for group in block.answers for name in group}
    _keep_batches(made, {str(v.name) for v in inputs}, answered, _fixed(inputs))
    return made


# where to cut -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Life:
    """An activation: alive between the nodes `born` and `dies` of the order."""

    value: ir.Value
    born: int
    dies: int


def _constant(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that compute from weights alone (Identity of a shared bias, DequantizeLinear): every part has its own."""
    found: set[ir.Node] = set()
    for node in graph:
        read = _reads(node)
        if node.op_type == "Constant" or (read and all(v.const_value is not None or v.producer() in found for v in read)):
            found.add(node)
    return found


def _needed(model: Model, wanted: Collection[str]) -> set[ir.Node]:
    """The nodes that the wanted tensors depend on."""
    needed: set[ir.Node] = set()
    waiting = [v.producer() for name, v in _made(model.graph).items() if name in wanted]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [v.producer() for v in _reads(node)]
    return needed


def _lives(order: Sequence[ir.Node], groups: Iterable[tuple[str, ...]]) -> dict[str, _Life]:
    born = {str(v.name): (v, i) for i, node in enumerate(order) for v in node.outputs if v.name}
    dies = {name: i for name, (_, i) in born.items()}
    for i, node in enumerate(order):
        dies |= {str(v.name): i for v in _reads(node) if str(v.name) in born}
    for group in groups:
        last = max((born[name][1] for name in group if name in born), default=0)
        dies |= {name: max(dies[name], last) for name in group if name in born}
    return {name: _Life(value, i, dies[name]) for name, (value, i) in born.items()}


def _alive(lives: dict[str, _Life], length: int) -> list[float]:
    """Bytes alive in front of each node."""
    born, dead = [0.0] * (length + 2), [0.0] * (length + 2)
    barred = [False] * (length + 2)
    for life in lives.values():
        size = _bytes(life.value)
        if size == inf:
            barred[life.born + 1 : life.dies + 1] = [True] * (life.dies - life.born)
            continue
        born[life.born + 1] += size
        dead[life.dies + 1] += size
    alive = itertools.accumulate(b - d for b, d in zip(born, dead, strict=True))
    return [inf if bar else size for bar, size in zip(barred, alive, strict=True)][:length]


def _bounds(alive: Sequence[float], weights: Sequence[dict[str, int]], limit: int) -> list[int]:
    """Where to cut: blocks within the limit, at the place in their later half where the least is alive."""
    bounds: list[int] = []
    first = 0
    while (end := _end(weights, first, limit, BLOCK_NODES)) < len(weights):
        earliest = max(_end(weights, first, int(limit * _EARLIEST), int(BLOCK_NODES * _EARLIEST)), first + 1)
        place = min(range(min(earliest, end), end + 1), key=lambda i: (alive[i], -i))
        if alive[place] == inf:
            place = next((i for i in range(end, len(alive)) if alive[i] < inf), len(alive))
        if place >= len(weights):
            break
        bounds.append(place)
        first = place
    return bounds


def _end(weights: Sequence[dict[str, int]], first: int, limit: int, nodes: int) -> int:
    """The longest run of nodes from `first` whose weights fit the limit ends here; one node at least, `nodes` at most."""
    read: set[str] = set()
    total = 0
    for i in range(first, len(weights)):
        total += sum(size for name, size in weights[i].items() if name not in read)
        read |= weights[i].keys()
        if i > first and (total > limit or i - first >= nodes):
            return i
    return len(weights)


def _block(order: Sequence[ir.Node], lives: dict[str, _Life], groups: Sequence[tuple[str, ...]], start: int, stop: int) -> Block:
    answers = tuple(g for g in groups if start <= max((lives[n].born for n in g if n in lives), default=0) < max(stop, 1))
    read = dict.fromkeys(str(v.name) for node in order[start:stop] for v in _reads(node))
    read |= dict.fromkeys(name for group in answers for name in group)
    takes = tuple(name for name in read if name in lives and lives[name].born < start)
    gives = tuple(name for name, life in lives.items() if start <= life.born < stop <= life.dies)
    return Block(takes, gives, answers)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, the bodies of If, Loop and Scan included."""
    read = [v for v in node.inputs if v is not None]
    for attr in node.attributes.values():
        bodies = [attr.as_graph()] if attr.type == ir.AttributeType.GRAPH else []
        bodies += list(attr.as_graphs()) if attr.type == ir.AttributeType.GRAPHS else []
        inner = [v for body in bodies for n in body.all_nodes() for v in n.inputs if v is not None]
        read += [v for v in inner if v.graph is node.graph]
    return read


def _weights(node: ir.Node, constant: Collection[ir.Node]) -> dict[str, int]:
    """Name and bytes of the weights that a node reads, itself or through constant nodes, and of what those compute.

    A dequantized weight takes four times the memory of its codes.
    """
    read = _reads(node)
    found = {str(v.name): int(v.const_value.nbytes) for v in read if v.const_value is not None}
    for value in read:
        maker = value.producer()
        if maker is not None and maker in constant:
            found |= {str(value.name): _computed(value)} | _weights(maker, constant)
    return found


def _computed(value: ir.Value) -> int:
    """Bytes of what a constant node computes; nothing where its shape is not known."""
    size = _bytes(value) if value.shape is not None else inf
    return 0 if size == inf else int(size)


def _bytes(value: ir.Value) -> float:
    """Roughly the size of an activation; infinite for what is not a tensor of known type."""
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
        return inf
    dims = value.shape if value.shape is not None else [_DYNAMIC] * 3
    return float(prod(d if isinstance(d, int) else _DYNAMIC for d in dims) * value.type.dtype.itemsize)


# the parts ----------------------------------------------------------------------------------------


def typed(model: Model) -> Model:
    """`model`, or a copy with inferred shapes where the type of an activation is not known."""
    if all(v.type is not None and v.shape is not None for node in model.graph for v in node.outputs if v.name):
        return model
    copy = model.clone()
    infer_shapes(copy)
    return copy


def _made(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(v.name): v for node in graph for v in node.outputs if v.name}


def _like(model: ir.Model, graph: ir.Graph) -> ir.Model:
    functions = [f.clone() for f in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _fixed(inputs: Iterable[ir.Value]) -> int | None:
    """Samples a run where every input with dimensions begins with the same number."""
    first = {v.shape[0] for v in inputs if v.shape is not None and len(v.shape)}
    only = next(iter(first)) if len(first) == 1 else None
    return only if isinstance(only, int) else None


def _keep_batches(model: Model, own: Collection[str], answered: Collection[str], fixed: int | None) -> None:
    for value in list(model.graph.inputs):
        if str(value.name) in own and fixed is not None:
            continue
        if not value.uses() and value.name not in answered:
            model.graph.inputs.remove(value)
        elif value.shape is not None and len(value.shape) and value.shape[0] != fixed:
            value.shape = None if fixed is not None else ir.Shape([None, *list(value.shape)[1:]])
