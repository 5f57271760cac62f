"""What the integer form costs a sample: multiply-accumulates, bit operations, bytes of weights (HAWQ-V3's three measures)."""

from __future__ import annotations

import math

import onnx_ir as ir

from qcompile.decide.decisions import decision
from qcompile.ir.ops import is_op, static_shape
from qcompile.pipeline.base import PassContext
from qcompile.target.integer.plan import Plan, Step

_SUMMED = ("macs", "bops", "weight_bytes")


def note_cost(found: Plan, ctx: PassContext) -> None:
    """A note for each convolution and product, and one with the totals."""
    layers = {str(s.node.name): _cost(s) for s in found.steps if s.family in ("linear", "product")}
    for name, numbers in layers.items():
        ctx.remarks.note(name, "cost of the layer a sample", **numbers)
    ctx.remarks.note("", "cost a sample", **{key: sum(numbers[key] for numbers in layers.values()) for key in _SUMMED})


def _cost(step: Step) -> dict[str, int]:
    """`macs`, `activation_bits`, `weight_bits` (of the second operand), `bops` = their product, and `weight_bytes` at the
    codes' true width; dimensions that are not known count as 1."""
    macs, activation, weight = _macs(step), _bits(step.node, 0), _bits(step.node, 1)
    stored = -(-_size(step.node.inputs[1]) * weight // 8) if step.family == "linear" else 0
    widths = {"activation_bits": activation, "weight_bits": weight}
    return {"macs": macs, **widths, "bops": macs * activation * weight, "weight_bytes": stored}


def _macs(step: Step) -> int:
    made = static_shape(step.output) or ()
    if is_op(step.node, "Conv"):
        return _size(step.node.inputs[1]) * math.prod(d or 1 for d in made[2:])
    inner = (static_shape(step.node.inputs[0]) or (None,))[-1]
    return math.prod(d or 1 for d in made) * (inner or 1)


def _bits(node: ir.Node, slot: int) -> int:
    found = decision(node, slot)
    return 8 if found is None else found.spec.qtype.bits


def _size(value: ir.Value | None) -> int:
    return math.prod(d or 1 for d in static_shape(value) or ())
