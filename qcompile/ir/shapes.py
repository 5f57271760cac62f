"""What is known about shapes without running anything: dimensions, and integer vectors computed from them."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.partial import Dim, partial_value

_MAX_NODES = 24


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """Dimensions of `value`; None when its rank is unknown."""
    if value is None or value.shape is None:
        return ops.static_shape(value)
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes of `value`, or None when unknown."""
    if value is not None and value.shape is not None:
        return len(value.shape)
    shape = ops.static_shape(value)
    return None if shape is None else len(shape)


def shape_vector(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """Elements of an integer vector (or scalar) made from shapes and constants, None for unknown ones; None if not a vector."""
    array = None if value is None else partial_value(value)
    return None if array is None or array.ndim > 1 else tuple(array.reshape(-1).tolist())


def int_vector(value: ir.Value | None) -> tuple[int, ...] | None:
    """`shape_vector` when every element is known, else None."""
    vector = shape_vector(value)
    if vector is None:
        return None
    known = tuple(v for v in vector if isinstance(v, int))
    return known if len(known) == len(vector) else None


def reshape_target(node: ir.Node) -> tuple[Dim, ...] | None:
    """Output dimensions of a Reshape or Expand, from inferred shapes and from its target vector; None if the rank is unknown."""
    inferred = dims(node.outputs[0])
    if inferred is not None and all(isinstance(d, int) for d in inferred):
        return inferred
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
    """The size that -1 stands for: what is left of the source's sizes, if it is known."""
    if source is None:
        return None
    others, left = [d for i, d in enumerate(target) if i != hole], list(source)
    for name in [d for d in others if isinstance(d, str) and d in left]:
        left.remove(name)
        others.remove(name)
    if not all(isinstance(d, int) and d > 0 for d in (*others, *left)):
        return None
    return _product(left) // _product(others)


def _product(values: list[Dim]) -> int:
    total = 1
    for value in values:
        total *= value if isinstance(value, int) else 1
    return total


def is_number(value: ir.Value | None) -> bool:
    """True for a one-element value that is constant or made from shapes and constants only (1/sqrt(head_dim), unfolded)."""
    if ops.const_scalar(value) is not None:
        return True
    shape = ops.static_shape(value)
    if value is None or shape is None or any(d != 1 for d in shape):
        return False
    return _made_from_shapes(value)


def _made_from_shapes(value: ir.Value) -> bool:
    stack: list[ir.Value | None] = [value]
    for _ in range(_MAX_NODES):
        if not stack:
            return True
        found = stack.pop()
        if found is None or ops.is_const(found):
            continue
        node = found.producer()
        if node is None:
            return False
        if not ops.is_op(node, "Shape", "Size"):
            stack.extend(node.inputs)
    return False
