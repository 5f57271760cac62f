"""Elementwise operators on integers, with the semantics of ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from qcompile.oracle import checked
from qcompile.oracle.graph import Op

Array = NDArray[Any]
Inputs = Sequence[Array | None]
Kernel = Callable[[Op, Inputs], list[Array]]


def present(inputs: Inputs) -> list[Array]:
    """The inputs that are given."""
    return [x for x in inputs if x is not None]


def _binary(function: Callable[[Array, Array], Array]) -> Kernel:
    def kernel(_: Op, inputs: Inputs) -> list[Array]:
        a, b = present(inputs)
        return [np.asarray(function(a, b))]

    return kernel


def _unary(function: Callable[[Array], Array]) -> Kernel:
    return lambda _, inputs: [np.asarray(function(present(inputs)[0]))]


def _many(function: Callable[[Array, Array], Array]) -> Kernel:
    return lambda _, inputs: [reduce(function, present(inputs))]


def _negative(a: Array) -> Array:
    return checked.subtract(np.zeros((), a.dtype), a)


def _magnitude(a: Array) -> Array:
    return np.maximum(a, _negative(a))


def _modulo(op: Op, inputs: Inputs) -> list[Array]:
    a, b = present(inputs)
    return [checked.modulo(a, b, truncated=bool(op.attributes.get("fmod", 0)))]


def _shift(op: Op, inputs: Inputs) -> list[Array]:
    a, b = present(inputs)
    return [checked.shift(a, b, right=op.attributes["direction"] == "RIGHT")]


def _clip(_: Op, inputs: Inputs) -> list[Array]:
    """min(max(x, low), high): a low end above the high end gives the high end, as ONNX says."""
    x, low, high = (*inputs, None, None)[:3]
    assert x is not None
    x = x if low is None else np.maximum(x, low)
    return [x if high is None else np.minimum(x, high)]


def _cast(op: Op, inputs: Inputs) -> list[Array]:
    """Integers wrap into a narrower type; bool is "not zero"."""
    (x,) = present(inputs)
    to = np.dtype(helper.tensor_dtype_to_np_dtype(int(op.attributes["to"])))
    return [x != 0 if to.kind == "b" else x.astype(checked.require_integers(np.zeros((), to)).dtype)]


def _where(_: Op, inputs: Inputs) -> list[Array]:
    condition, a, b = present(inputs)
    return [np.where(condition, a, b)]


ELEMENTWISE: dict[str, Kernel] = {
    "Add": _binary(checked.add),
    "Sub": _binary(checked.subtract),
    "Mul": _binary(checked.multiply),
    "Div": _binary(checked.divide),
    "Mod": _modulo,
    "Neg": _unary(_negative),
    "Abs": _unary(_magnitude),
    "Sign": _unary(np.sign),
    "Relu": _unary(lambda a: np.maximum(a, np.zeros((), a.dtype))),
    "Max": _many(np.maximum),
    "Min": _many(np.minimum),
    "Clip": _clip,
    "Cast": _cast,
    "BitShift": _shift,
    "BitwiseAnd": _binary(np.bitwise_and),
    "BitwiseOr": _binary(np.bitwise_or),
    "BitwiseXor": _binary(np.bitwise_xor),
    "Equal": _binary(np.equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Xor": _binary(np.logical_xor),
    "Not": _unary(np.logical_not),
    "Where": _where,
}
