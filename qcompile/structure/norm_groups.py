"""GroupNorm written as Reshape -> InstanceNormalization -> Reshape -> Mul -> Add, and plain InstanceNorm."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims
from qcompile.structure.core import Site, only_user, other_input


def group_chain(norm: ir.Node) -> tuple[ir.Value, ir.Value, Site | None, Site | None, tuple[ir.Node, ...]] | None:
    """(input, output, gamma site, beta site, nodes) around an InstanceNormalization; None if its constants are computed."""
    x = norm.inputs[0]
    if x is None or not (ops.is_const(norm.inputs[1]) and ops.is_const(norm.inputs[2])):
        return None
    front, back = x.producer(), only_user(norm.outputs[0], "Reshape")
    if front is None or back is None or not ops.is_op(front, "Reshape"):
        return x, norm.outputs[0], (norm, 1), (norm, 2), (norm,)
    source = front.inputs[0]
    if source is None:
        return None
    nodes = [front, norm, back]
    gamma, value = _affine(back.outputs[0], "Mul", _channels(source), nodes)
    beta, value = _affine(value, "Add", _channels(source), nodes)
    return source, value, gamma, beta, tuple(nodes)


def _channels(x: ir.Value) -> int | None:
    shape = dims(x)
    size = shape[1] if shape is not None and len(shape) > 1 else None
    return size if isinstance(size, int) else None


def _affine(value: ir.Value, op_type: str, channels: int | None, nodes: list[ir.Node]) -> tuple[Site | None, ir.Value]:
    user = only_user(value, op_type)
    constant = None if user is None else other_input(user, value)
    if user is None or not _is_per_channel(constant, channels):
        return None, value
    nodes.append(user)
    return (user, 1 if user.inputs[1] is constant else 0), user.outputs[0]


def _is_per_channel(value: ir.Value | None, channels: int | None) -> bool:
    """True for a constant of shape [C, 1, 1] or [1, C, 1, 1] (any number of trailing ones)."""
    shape = ops.static_shape(value) if ops.is_const(value) else None
    if not shape or len(shape) < 2:
        return False
    wide = [d for d in shape if d != 1]
    return len(wide) <= 1 and shape[-1] == 1 and (channels is None or wide in ([channels], []))
