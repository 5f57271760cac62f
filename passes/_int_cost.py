"""What the integer form costs a sample: multiply-accumulates, bit operations, bytes of weights (HAWQ-V3's three measures)."""

from __future__ import annotations

import math

import onnx_ir as ir

from qcompile.ir.decisions import decision
from qcompile.ir.ops import is_op, static_shape
from qcompile.passes._int_plan import Plan, Step


def cost(found: Plan) -> dict[str, int]:
    """`macs` of integer products, `bops` = macs times the bits of both operands, `weight_bytes` at the codes' true width.

    For one sample: dimensions that are not known count as 1.
    """
    layers = [s for s in found.steps if s.family in ("linear", "product")]
    macs = [_macs(s) for s in layers]
    bops = sum(m * _bits(s.node, 0) * _bits(s.node, 1) for m, s in zip(macs, layers, strict=True))
    bits = sum(_size(s.node.inputs[1]) * _bits(s.node, 1) for s in layers if s.family == "linear")
    return {"macs": sum(macs), "bops": bops, "weight_bytes": bits // 8}


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
