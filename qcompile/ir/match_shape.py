"""What is known about a shape without running anything: dimensions, and the targets of Reshape and Expand."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir import ops

Dim = int | str | None
"""A size, the name of a symbolic size, or unknown."""

_MAX_DEPTH = 8


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """Dimensions of `value`; None when its rank is unknown."""
    if value is None or value.shape is None:
        return ops.static_shape(value)
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes of `value`, or None when unknown."""
    shape = dims(value)
    return None if shape is None else len(shape)


def reshape_target(node: ir.Node) -> tuple[Dim, ...] | None:
    """Output dimensions of a Reshape or Expand, from inferred shapes and from its target vector; None if the rank is unknown."""
    inferred = dims(node.outputs[0])
    target = shape_vector(ops.input_at(node, 1))
    if target is None:
        return inferred
    if node.op_type == "Reshape":
        target = _resolve(target, dims(node.inputs[0]), ops.int_attr(node, "allowzero", 0))
    else:
        target = tuple(None if d == 1 else d for d in target)
    if inferred is None or len(inferred) != len(target):
        return target if inferred is None else inferred
    return tuple(known if isinstance(known, int) or d is None else d for known, d in zip(inferred, target, strict=True))


def _resolve(target: tuple[Dim, ...], source: tuple[Dim, ...] | None, allowzero: int) -> tuple[Dim, ...]:
    resolved = list(target)
    for i, dim in enumerate(target):
        if dim == 0 and not allowzero:
            resolved[i] = source[i] if source is not None and i < len(source) else None
        elif dim == -1:
            resolved[i] = _rest(resolved, i, source)
    return tuple(resolved)


def _rest(target: list[Dim], hole: int, source: tuple[Dim, ...] | None) -> Dim:
    others = [d for i, d in enumerate(target) if i != hole]
    if source is None:
        return None
    left = list(source)
    for dim in [d for d in others if isinstance(d, str)]:
        if dim in left:
            left.remove(dim)
            others.remove(dim)
    if not all(isinstance(d, int) and d > 0 for d in (*others, *left)):
        return None
    return _product(left) // _product(others)


def _product(values: list[Dim]) -> int:
    total = 1
    for value in values:
        total *= value if isinstance(value, int) else 1
    return total


def shape_vector(value: ir.Value | None, depth: int = 0) -> tuple[Dim, ...] | None:
    """Elements of an integer vector (or scalar) computed from shapes and constants; None if its length is unknown."""
    constant = ops.const_ints(value)
    if constant is not None:
        return constant
    node = None if value is None else value.producer()
    if node is None or depth > _MAX_DEPTH or node.domain:
        return _unknown(value)
    match node.op_type:
        case "Shape":
            return _slice_of_shape(node)
        case "Concat":
            return _concat(node, depth)
        case "Gather":
            return _gather(node, depth)
        case "Unsqueeze" | "Squeeze" | "Cast" | "Identity" | "Reshape":
            return shape_vector(node.inputs[0], depth + 1)
        case _:
            return _unknown(value)


def _unknown(value: ir.Value | None) -> tuple[Dim, ...] | None:
    shape = ops.static_shape(value)
    if shape is None or len(shape) > 1 or None in shape:
        return None
    return (None,) * (int(shape[0] or 0) if shape else 1)


def _slice_of_shape(node: ir.Node) -> tuple[Dim, ...] | None:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    end = node.attributes.get("end")
    return shape[ops.int_attr(node, "start", 0) : None if end is None else end.as_int()]


def _concat(node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
    parts = [shape_vector(v, depth + 1) for v in node.inputs]
    if any(p is None for p in parts):
        return None
    return tuple(d for p in parts if p is not None for d in p)


def _gather(node: ir.Node, depth: int) -> tuple[Dim, ...] | None:
    indices = ops.const_ints(ops.input_at(node, 1))
    if indices is None:
        return _unknown(node.outputs[0])
    source = shape_vector(node.inputs[0], depth + 1)
    if source is None or any(not -len(source) <= i < len(source) for i in indices):
        return (None,) * len(indices)
    return tuple(source[i] for i in indices)
