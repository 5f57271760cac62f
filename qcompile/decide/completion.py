"""What is left to decide in a graph that brought decisions along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.decide.decisions import decision, decisions
from qcompile.decide.placement import Point
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.ops import is_compute, is_data_movement, is_op


@dataclass
class Completion:
    """`open`: points that nothing imported covers.  `shared`: points whose tensor another reader quantizes already, with that
    quantizer.  `nodes`: those with imported decisions.
    """

    open: list[Point] = field(default_factory=list[Point])
    shared: list[tuple[Point, Quantizer]] = field(default_factory=list[tuple[Point, Quantizer]])
    nodes: set[str] = field(default_factory=set[str])


def _moved(value: ir.Value) -> Quantizer | None:
    """The imported quantizer of a tensor that was only moved since."""
    node = value.producer()
    while node is not None and (is_data_movement(node) or is_op(node, "MaxPool")) and not is_op(node, "Concat", "Pad"):
        found = decision(node, 0)
        if found is not None:
            return found if found.imported else None
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return None


@dataclass(frozen=True)
class _Known:
    """Imported quantizers by tensor, and the nodes whose weights have one."""

    tensors: dict[ir.Value, Quantizer]
    weighted: set[ir.Node]


def completion(graph: ir.Graph, points: Iterable[Point], *, every: bool = False, one: bool = False) -> Completion:
    """Sort the points of a placement.

    `every`: the target wants all of them, so that a layer of quantized weights alone gets codes for its input too.  `one`: a
    tensor may have no more than one quantizer.
    """
    found = [use for use in decisions(graph) if use.quantizer.imported]
    known = _Known({u.value: u.quantizer for u in found if not u.is_weight}, {u.node for u in found if u.is_weight})
    out = Completion(nodes={str(u.node.name) for u in found})
    for point in points:
        if not found:
            out.open.append(point)
        elif not _covered(point, known, every):
            _sort_in(out, point, known, one)
    return out


def _covered(point: Point, known: _Known, every: bool) -> bool:
    """Whether the import says what becomes of the tensor here: a decision, a layer of quantized weights alone, or Q/DQ nodes that
    stayed."""
    own = decision(point.node, point.slot)
    value = point.value
    ends = (value.producer(), *(node for node, _ in value.uses() if point.slot < 0))
    stays = not point.is_weight and any(is_op(node, "DequantizeLinear", "QuantizeLinear") for node in ends)
    alone = not (every or point.is_weight) and point.slot >= 0 and point.node in known.weighted and _moved(value) is None
    return stays or alone or (own is not None and own.imported)


def _sort_in(out: Completion, point: Point, known: _Known, one: bool) -> None:
    quantizer = None if point.is_weight else known.tensors.get(point.value) or _moved(point.value)
    float_reader = not one and point.slot >= 0 and not is_compute(point.node) and quantizer is known.tensors.get(point.value)
    if quantizer is None or float_reader or quantizer.spec.qtype.bits != point.spec.qtype.bits:
        out.open.append(point)
    elif point.slot >= 0:
        out.shared.append((point, quantizer))
