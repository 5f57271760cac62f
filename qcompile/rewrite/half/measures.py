"""What the rules of the 16-bit passes look at: the graph, bounds from its weights, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe import MinMax, MinMaxStat, Probe, Told
from qcompile.ir.ops import const_array, const_ints, const_scalar, input_at, ints_attr, is_data_movement, is_op, static_shape
from qcompile.ir.optable import ops_with
from qcompile.rewrite.half.bounds import clip_bound, upper_bounds
from qcompile.rewrite.half.mask import Masks, find_masks
from qcompile.rewrite.half.types import Narrow, before_quantizer, copies, float_constants, grown, is_float, largest, probe
from qcompile.structure.core import only_user

UNKNOWN_DEPTH = 4096
CANCEL = 16.0  # a term this much larger than the output is off by more than 2^-8 of its range when rounded to float16
_BOUNDED = ops_with("bounded") | {"QuantizeLinear", "DequantizeLinear"}
_SINGULAR = ("Log", "Div", "Reciprocal", "Pow")  # infinite at zero
REDUCTIONS = ("ReduceSum", "ReduceMean", "GlobalAveragePool", "AveragePool", "CumSum")
ReducedBy = tuple[ir.Node, ir.Value, int]


@dataclass
class Measures:
    """One graph before its conversion to `fmt`.  `margin` below 1 while weights may still change: ask for more statistics."""

    graph: ir.Graph
    fmt: Narrow
    told: Told = field(default_factory=Told)
    margin: float = 1.0

    def __post_init__(self) -> None:
        self.bounds = upper_bounds(self.graph)
        self.masks: Masks = find_masks(self.graph)

    def probes(self) -> Iterator[Probe]:
        """Everything that the rules will read."""
        values = [*self.watched(), *self.integers(), *self.angles(), *(v for _, v, _ in self.deep())]
        values += [v for n, *_ in self.cuts() if (v := n.inputs[0]) is not None]
        meant = _meant_infinite(self.graph)
        yield from dict.fromkeys(probe(v) for v in values if v not in meant)
        yield from dict.fromkeys(signed(v) for v in [*self.masks.scaled, *(v for _, v in self.divisors())] if v not in meant)

    def peak(self, value: ir.Value | None) -> float:
        """The largest magnitude: what was measured, else what the weights allow."""
        if value is None:
            return 0.0
        stat = self.told.get(probe(value))
        return self.bound(value) if stat is None else grown(value, largest(stat))

    def bound(self, value: ir.Value) -> float:
        """An upper bound from the weights."""
        return self.bounds.get(str(value.name), float("inf"))

    def watched(self) -> Iterator[ir.Value]:
        """Tensors that may exceed the safe range as far as the weights tell."""
        for node in self.graph:
            if node.op_type in _BOUNDED or copies(node) or any(np.isinf(a).any() for _, a in float_constants(node)):
                continue  # an infinity that the model writes itself is meant, and is one in 16 bits too
            for value in node.outputs:
                if is_float(value) and value.uses() and self._exceeds(value, self.fmt.safe):
                    yield value

    def _exceeds(self, value: ir.Value, limit: float) -> bool:
        return value.name not in self.masks.reached and self.bound(value) > limit * self.margin

    def integers(self) -> Iterator[ir.Value]:
        """Floats made of integers, which are exact only up to a size."""
        for node in self.graph:
            source = input_at(node, 0)
            made = is_op(node, "Cast") and is_float(node.outputs[0]) and source is not None and _is_integer(source)
            if made and node.outputs[0].name not in self.masks.reached:
                yield node.outputs[0]

    def angles(self) -> Iterator[ir.Value]:
        """Arguments of sine and cosine that may be many periods."""
        for node in self.graph:
            value = input_at(node, 0)
            if is_op(node, "Sin", "Cos") and value is not None and is_float(value) and self._exceeds(value, self.fmt.angle):
                yield value

    def deep(self) -> Iterator[ReducedBy]:
        """(reduction, its input, how many terms) where the running sum may overflow as far as the weights tell."""
        for node in self.graph:
            value = input_at(node, 0)
            if not is_op(node, *REDUCTIONS) or value is None or not is_float(value) or not self.fmt.ranged:
                continue
            terms = depth(node)
            if self._exceeds(value, self.fmt.largest / terms):
                yield node, before_quantizer(value), terms

    def cuts(self) -> Iterator[tuple[ir.Node, float, float]]:
        """(layer, largest weight, bound) where the only reader is a Clip that may hide much larger terms."""
        for node in self.graph:
            weight = const_array(input_at(node, 1)) if is_op(node, "Conv", "Gemm", "MatMul") and self.fmt.ranged else None
            clip = only_user(node.outputs[0], "Clip") if weight is not None else None
            if weight is None or clip is None or not weight.size or weight.dtype != np.float32 or node.inputs[0] is None:
                continue
            largest_weight, end = float(np.abs(weight).max()), clip_bound(clip)
            if largest_weight * self.bound(node.inputs[0]) > CANCEL * end * self.margin:
                yield node, largest_weight, end

    def divisors(self) -> Iterator[tuple[ir.Node, ir.Value]]:
        """Computed operands that something is divided by, or whose logarithm is taken."""
        for node in self.graph:
            slot = 1 if is_op(node, "Div") else 0 if is_op(node, "Reciprocal", "Log") or _inverse_power(node) else None
            value = input_at(node, slot) if slot is not None else None
            if value is not None and is_float(value) and const_array(value) is None and self.fmt.ranged:
                yield node, before_quantizer(value)

    def smallest(self, value: ir.Value) -> float:
        """The smallest magnitude that was measured, infinity if it was not or the sign changes."""
        stat = self.told.get(signed(value))
        if stat is None:
            return float("inf")
        low, high = float(stat.lo), float(stat.hi)
        return low if low >= 0 else -high if high <= 0 else float("inf")

    def large(self) -> dict[ir.Value, float]:
        """Tensors beyond the safe range, also where they are only copied on."""
        found = {v: self.peak(v) for v in self.watched()}
        found |= {v: self._mask_peak(v) for v in self.masks.scaled}
        found = {v: amax for v, amax in found.items() if amax > self.fmt.safe}
        found |= {v: amax for v in self.integers() if (amax := self.peak(v)) > min(self.fmt.integers, self.fmt.safe)}
        for node in self.graph:
            reach = max((found[v] for v in node.inputs if v in found), default=0.0) if copies(node) else 0.0
            if reach and not (is_op(node, "Clip") and clip_bound(node) <= self.fmt.safe):
                found |= {v: reach for v in node.outputs if is_float(v)}
        return found

    def _mask_peak(self, value: ir.Value) -> float:
        """Masks are negative: what counts is the other side."""
        stat = self.told.get(signed(value))
        return float(stat.hi) if stat is not None else 0.0


def _meant_infinite(graph: ir.Graph) -> set[ir.Value]:
    """What follows from shapes alone and may be infinite on purpose (the buckets of T5's positions, behind Log(0)): it is not
    measured and stays in float32 as far as its bounds tell."""
    data = {v for v in graph.inputs if v.name not in graph.initializers}
    found: set[ir.Value] = set()
    for node in graph:
        reads = not node.inputs or any(v in data for v in node.inputs) or any(True for _ in _bodies(node))
        if reads and not is_op(node, "Shape", "Size"):
            data.update(node.outputs)
        elif is_op(node, *_SINGULAR) or any(v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _bodies(node: ir.Node) -> Iterator[ir.Attr]:
    return (a for a in node.attributes.values() if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS))


def signed(value: ir.Value) -> Probe[MinMaxStat]:
    """Both extremes of the whole tensor."""
    return MinMax().of(value)


def depth(node: ir.Node) -> int:
    """How many elements one output of a reduction adds up; a guess where a dimension is dynamic."""
    shape = static_shape(node.inputs[0])
    if shape is None:
        return UNKNOWN_DEPTH
    total = 1
    for axis in _axes(node, len(shape)):
        total *= shape[axis] or UNKNOWN_DEPTH
    return total


def _axes(node: ir.Node, rank: int) -> list[int]:
    if is_op(node, "GlobalAveragePool", "AveragePool"):
        return list(range(2, rank))
    given = ints_attr(node, "axes") or const_ints(input_at(node, 1))
    return [axis % rank for axis in given or range(rank)]


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _inverse_power(node: ir.Node) -> bool:
    exponent = const_scalar(input_at(node, 1)) if is_op(node, "Pow") else None
    return exponent is not None and exponent < 0


def is_elementwise(node: ir.Node) -> bool:
    """Cheap work: what copies, and arithmetic on single elements."""
    return is_data_movement(node) or is_op(node, *ops_with("elementwise"))
