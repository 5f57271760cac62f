"""Which values jump where the input moves a little (indices, flags, rounded numbers), and which differ from run to run.

A small error of a smooth value is a small error behind it; one of a score can exchange two indices.  Outputs of the two kinds
cannot be judged by one figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompile.ir.ops import const_scalar, input_at, int_attr, is_data_movement, is_op
from qcompile.ir.optable import ops_with

_JUMPS = ops_with("jumps")
_RANDOM = ops_with("random")
_WEIGHS = ops_with("compute")
_KEEPS = ops_with("movement") | ops_with("arithmetic") | ops_with("picks") | {"And", "Cast", "Not", "OneHot", "Or", "Xor"}
_SELECTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Compress", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"), (1,)),
    "If": (0,),
    "Loop": (0, 1),
    "Slice": (1, 2),
}
"""Inputs that say which elements are taken."""


@dataclass(frozen=True)
class Nature:
    """What small errors and further runs do to a value.

    `computed`: rounding touches it; `data`: it is copied from float inputs or weights.  `made`: the operator whose jumps it
    consists of, if it holds nothing else; `behind`: the one that chose which elements it holds; `random`: the one that makes
    every run another.  Names of operators; empty where there is none.
    """

    computed: bool = False
    data: bool = False
    made: str = ""
    behind: str = ""
    random: str = ""

    @property
    def smooth(self) -> bool:
        """Whether two runs with a small error between them give nearly the same."""
        return not (self.made or self.behind or self.random)


EXACT = Nature()


def natures(graph: ir.Graph) -> list[Nature]:
    """The nature of each output of `graph`, whose nodes are sorted."""
    if not _any_jump(graph):
        return [EXACT for _ in graph.outputs]
    facts = {v: Nature(data=True) for v in graph.inputs if _is_float(v) and v.name not in graph.initializers}
    facts |= {v: Nature(data=True) for v in graph.initializers.values() if _is_weight(v)}
    _walk(graph, facts)
    return [facts.get(v, EXACT) for v in graph.outputs]


def random_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes, those of bodies included, that make another output at each run: random operators, Dropout in training mode."""
    return [node for node in graph.all_nodes() if _is_random(node)]


def _any_jump(graph: ir.Graph) -> bool:
    return any(n.domain or n.op_type in _JUMPS or n.op_type in ("Cast", "If", "Loop") or _is_random(n) for n in graph.all_nodes())


def _walk(nodes: Iterable[ir.Node], facts: dict[ir.Value, Nature]) -> None:
    for node in nodes:
        read = [EXACT if v is None else facts.get(v, EXACT) for v in node.inputs]
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        answers = [n for body in bodies for n in _inside(body, read, facts)]
        for i, value in enumerate(node.outputs):
            facts[value] = _of(node, i, read, answers)


def _inside(body: ir.Graph, read: Sequence[Nature], facts: dict[ir.Value, Nature]) -> list[Nature]:
    """The answers of a body whose inputs may be any of the node's."""
    facts |= dict.fromkeys(body.inputs, replace(_joined(read), made=""))
    _walk(body, facts)
    return [facts.get(v, EXACT) for v in body.outputs]


def _of(node: ir.Node, output: int, read: Sequence[Nature], answers: Sequence[Nature]) -> Nature:
    joined = _joined([*read, *answers])
    if is_op(node, "Shape", "Size"):
        return EXACT
    if _is_random(node):
        return replace(joined, computed=True, random=node.op_type)
    if joined.computed and _jumps(node, output):
        return replace(joined, made=node.op_type)
    keeps = node.domain == "" and (node.op_type in _KEEPS or bool(answers))
    moves = is_data_movement(node) or node.op_type == "Cast"
    picked = _chosen_by(node, read, answers)
    computed = joined.computed or (not moves and (joined.data or node.op_type in _WEIGHS))
    return replace(joined, computed=computed, made=joined.made if keeps else "", behind=joined.behind or picked)


def _chosen_by(node: ir.Node, read: Sequence[Nature], answers: Sequence[Nature]) -> str:
    """The operator whose jumps say which elements the node takes, or which way or how often it goes."""
    choices = [read[i].made for i in _SELECTS.get(node.op_type, ()) if i < len(read)]
    choices += [n.made for n in answers[:1] if node.op_type == "Loop"]
    return next(filter(None, choices), "")


def _joined(read: Sequence[Nature]) -> Nature:
    """Of values that one value is made of: it consists of jumps where all do that rounding could touch."""
    told = [n for n in read if n.computed or n.data]
    made = told[0].made if told and all(n.made for n in told) else ""
    behind, random = (next(filter(None, names), "") for names in ((n.behind for n in read), (n.random for n in read)))
    return Nature(any(n.computed for n in read), any(n.data for n in read) and not made, made, behind, random)


def _jumps(node: ir.Node, output: int) -> bool:
    if node.domain:
        return (dtype := node.outputs[output].dtype) is not None and not dtype.is_floating_point()
    if is_op(node, "Cast"):
        source, to = node.inputs[0], ir.DataType(int_attr(node, "to", 1))
        return not to.is_floating_point() and (source is None or source.dtype is None or source.dtype.is_floating_point())
    return node.op_type in _JUMPS and not (node.op_type == "TopK" and output == 0)


def _is_random(node: ir.Node) -> bool:
    if node.domain == "" and node.op_type == "Dropout":
        return const_scalar(input_at(node, 2)) == 1.0
    return node.domain == "" and node.op_type in _RANDOM


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _is_weight(value: ir.Value) -> bool:
    return _is_float(value) and (value.shape is None or len(value.shape) >= 2)
