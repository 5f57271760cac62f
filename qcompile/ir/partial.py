"""Partial evaluation of the small integer tensors that exporters compute from shapes (Reshape targets, pads, slice bounds)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir import ops

Dim = int | str | None
"""A size, the name of a symbolic size, or unknown."""

_Partial = NDArray[Any]
_MAX_NODES = 200
_MAX_SIZE = 64


def partial_value(value: ir.Value) -> _Partial | None:
    """`value` as an object array of `Dim`, unknown elements None; None if not even its shape is known, or it is large."""
    return _Evaluator().of(value)


class _Evaluator:
    def __init__(self) -> None:
        self.known: dict[ir.Value, _Partial | None] = {}

    def of(self, value: ir.Value | None) -> _Partial | None:
        if value is None:
            return None
        if value not in self.known:
            self.known[value] = None
            self.known[value] = self._compute(value)
        return self.known[value]

    def _compute(self, value: ir.Value) -> _Partial | None:
        constant = _integers(value)
        if constant is not None:
            return constant
        node = value.producer()
        rule = None if node is None or node.domain or len(self.known) > _MAX_NODES else _RULES.get(node.op_type)
        if node is None or rule is None:
            return _unknown(value)
        try:
            result = rule(node, self.of)
        except (IndexError, ValueError, TypeError, ZeroDivisionError):
            result = None
        return _unknown(value) if result is None else result


Of = Callable[[ir.Value | None], _Partial | None]


def _integers(value: ir.Value) -> _Partial | None:
    tensor = ops.const_value(value)
    if tensor is None or not tensor.dtype.is_integer() or tensor.size > _MAX_SIZE:
        return None
    return tensor.numpy().astype(object)


def _unknown(value: ir.Value) -> _Partial | None:
    shape = ops.static_shape(value)
    sizes = [d for d in shape if d is not None] if shape is not None else []
    if shape is None or len(sizes) != len(shape) or int(np.prod(sizes, dtype=np.int64)) > _MAX_SIZE:
        return None
    return np.full(sizes, None, dtype=object)


def _shape(node: ir.Node, of: Of) -> _Partial | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    sizes = [d if isinstance(d, int) else d.value for d in source.shape]
    end = node.attributes.get("end")
    return np.array(sizes[ops.int_attr(node, "start", 0) : None if end is None else end.as_int()], dtype=object)


def _gather(node: ir.Node, of: Of) -> _Partial | None:
    data, indices = of(node.inputs[0]), of(node.inputs[1])
    if data is None or indices is None or any(i is None for i in indices.reshape(-1)):
        return None
    return np.asarray(np.take(data, indices.astype(np.int64), axis=ops.int_attr(node, "axis", 0)), dtype=object)


def _concat(node: ir.Node, of: Of) -> _Partial | None:
    parts = [of(v) for v in node.inputs]
    known = [p for p in parts if p is not None]
    return np.concatenate(known, axis=ops.int_attr(node, "axis", 0)) if len(known) == len(parts) else None


def _slice(node: ir.Node, of: Of) -> _Partial | None:
    data = of(node.inputs[0])
    bounds = [of(ops.input_at(node, slot)) for slot in range(1, 5)]
    starts, ends = bounds[0], bounds[1]
    if data is None or starts is None or ends is None:
        return None
    axes = bounds[2] if bounds[2] is not None else np.arange(len(starts))
    steps = bounds[3] if bounds[3] is not None else np.ones(len(starts), dtype=np.int64)
    index = [slice(None)] * data.ndim
    for start, end, axis, by in zip(starts, ends, axes, steps, strict=True):
        reaches_front = by < 0 and end < -data.shape[axis]
        index[axis] = slice(int(start), None if reaches_front else int(end), int(by))
    return data[tuple(index)]


def _reshape(node: ir.Node, of: Of) -> _Partial | None:
    data, target = of(node.inputs[0]), of(node.inputs[1])
    return None if data is None or target is None else data.reshape([int(d) for d in target])


def _unsqueeze(node: ir.Node, of: Of) -> _Partial | None:
    data, axes = of(node.inputs[0]), _axes(node, of)
    return None if data is None or axes is None else np.expand_dims(data, axes)


def _squeeze(node: ir.Node, of: Of) -> _Partial | None:
    data, axes = of(node.inputs[0]), _axes(node, of)
    return None if data is None else np.asarray(np.squeeze(data, axes), dtype=object)


def _axes(node: ir.Node, of: Of) -> tuple[int, ...] | None:
    axes = of(ops.input_at(node, 1))
    return ops.ints_attr(node, "axes") if axes is None else tuple(int(a) for a in axes.reshape(-1))


def _transpose(node: ir.Node, of: Of) -> _Partial | None:
    data = of(node.inputs[0])
    return None if data is None else data.transpose(ops.ints_attr(node, "perm"))


def _copy(node: ir.Node, of: Of) -> _Partial | None:
    return of(node.inputs[0])


def _cast(node: ir.Node, of: Of) -> _Partial | None:
    return of(node.inputs[0]) if ir.DataType(ops.int_attr(node, "to", 1)).is_integer() else None


def _constant_of_shape(node: ir.Node, of: Of) -> _Partial | None:
    sizes, fill = of(node.inputs[0]), node.attributes.get("value")
    if sizes is None or fill is None:
        return None
    number = fill.as_tensor().numpy().reshape(-1)[0]
    return np.full([int(d) for d in sizes], int(number), dtype=object) if number == int(number) else None


def _elementwise(function: Callable[[int, int], int], neutral: int | None) -> Callable[[ir.Node, Of], _Partial | None]:
    def one(a: Dim, b: Dim) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return function(a, b)
        return a if b == neutral and neutral is not None else None

    def apply(node: ir.Node, of: Of) -> _Partial | None:
        first, second = of(node.inputs[0]), of(node.inputs[1])
        return None if first is None or second is None else np.asarray(np.frompyfunc(one, 2, 1)(first, second), dtype=object)

    return apply


def _equal(a: Dim, b: Dim) -> bool | None:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    names, numbers = [d for d in (a, b) if isinstance(d, str)], [d for d in (a, b) if isinstance(d, int)]
    return False if names and numbers and numbers[0] < 0 else None


def _equality(node: ir.Node, of: Of) -> _Partial | None:
    first, second = of(node.inputs[0]), of(node.inputs[1])
    return None if first is None or second is None else np.asarray(np.frompyfunc(_equal, 2, 1)(first, second), dtype=object)


def _where(node: ir.Node, of: Of) -> _Partial | None:
    condition, yes, no = (of(v) for v in node.inputs)
    if condition is None or yes is None or no is None:
        return None
    choose = np.frompyfunc(lambda c, a, b: None if c is None else a if c else b, 3, 1)
    return np.asarray(choose(condition, yes, no), dtype=object)


_RULES: dict[str, Callable[[ir.Node, Of], _Partial | None]] = {
    "Add": _elementwise(lambda a, b: a + b, 0),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(lambda a, b: a // b if a * b >= 0 else -(-a // b), 1),
    "Equal": _equality,
    "Gather": _gather,
    "Identity": _copy,
    "Mod": _elementwise(lambda a, b: a % b, None),
    "Mul": _elementwise(lambda a, b: a * b, 1),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _elementwise(lambda a, b: a - b, 0),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
