"""Walk back from an attention operand to the linear that projects it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.channels.trace import is_scaling
from qcompile.structure.linear import Linear
from qcompile.structure.norm import Norm

_MAX_VISITS = 48


@dataclass(frozen=True)
class Source:
    """The linear behind a value, and what stands between: Mul/Div by one number, a rotary embedding, a norm over the head."""

    linear: Linear
    scales: tuple[ir.Node, ...]
    rope: bool
    norm: bool


@dataclass(frozen=True)
class _Walk:
    value: ir.Value
    scales: tuple[ir.Node, ...] = ()
    rope: bool = False
    norm: bool = False


def find_source(value: ir.Value, linears: dict[ir.Value, Linear], norms: dict[ir.Value, Norm]) -> Source | None:
    """The nearest linear behind `value`, through movement, scaling, rotary embedding and norms; None if something else is met."""
    stack = [_Walk(value)]
    for _ in range(_MAX_VISITS):
        if not stack:
            return None
        walk = stack.pop()
        linear = linears.get(walk.value)
        if linear is not None:
            return Source(linear, walk.scales, walk.rope, walk.norm)
        stack.extend(reversed(_behind(walk, norms)))
    return None


def _behind(walk: _Walk, norms: dict[ir.Value, Norm]) -> list[_Walk]:
    norm = norms.get(walk.value)
    if norm is not None:
        return [replace(walk, value=norm.input, norm=True)]
    node = walk.value.producer()
    if node is None or node.domain:
        return []
    if node.op_type == "Concat":
        return [replace(walk, value=v) for v in node.inputs if v is not None and not ops.is_const(v)]
    if ops.is_data_movement(node) or node.op_type == "Cast":
        return _to(walk, node.inputs[0])
    if node.op_type in ("Mul", "Div", "Add", "Sub", "Neg"):
        return _behind_arithmetic(walk, node)
    return []


def _behind_arithmetic(walk: _Walk, node: ir.Node) -> list[_Walk]:
    for slot in range(min(2, len(node.inputs))):
        if is_scaling(node, slot):
            return _to(replace(walk, scales=(*walk.scales, node)), node.inputs[slot])
    if node.op_type == "Neg":
        return _to(replace(walk, rope=True), node.inputs[0])
    if node.op_type == "Div":
        return _to(replace(walk, norm=True), node.inputs[0])
    if node.op_type == "Mul":
        return [w for v in node.inputs for w in _to(replace(walk, norm=walk.norm or not walk.rope), v)]
    if all(v is not None and ops.is_op(v.producer(), "Mul", "Concat") for v in node.inputs):
        return [w for v in node.inputs for w in _to(replace(walk, rope=True), v)]
    return []


def _to(walk: _Walk, value: ir.Value | None) -> list[_Walk]:
    return [] if value is None or ops.is_const(value) else [replace(walk, value=value)]
