"""What follows a tensor element by element, as one function: where an error of it can be seen, and where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.ops import const_scalar, float_attr, int_attr, is_op
from qcompile.structure.activation import BINARY, UNARY, gelu_tanh
from qcompile.structure.core import data_uses

_Array = NDArray[np.float64]
_MAX_NODES = 16


def _clip(node: ir.Node, x: _Array) -> _Array:
    ends = [const_scalar(v) for v in node.inputs[1:]]
    low, high = (*ends, None, None)[:2]
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _gelu(node: ir.Node, x: _Array) -> _Array:
    return gelu_tanh(x)  # within 5e-4 of the exact one: enough for the choice of a range


_SHAPED: dict[str, Callable[[ir.Node, _Array], _Array]] = {
    "Cast": lambda node, x: x,
    "Clip": _clip,
    "Elu": lambda node, x: np.where(x > 0, x, float_attr(node, "alpha", 1.0) * np.expm1(np.minimum(x, 0))),
    "Gelu": _gelu,
    "HardSigmoid": lambda node, x: np.clip(float_attr(node, "alpha", 0.2) * x + float_attr(node, "beta", 0.5), 0, 1),
    "HardSwish": lambda node, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda node, x: np.where(x > 0, x, float_attr(node, "alpha", 0.01) * x),
    "Mish": lambda node, x: x * np.tanh(np.logaddexp(0, x)),
    "Relu": lambda node, x: np.maximum(x, 0),
    "Swish": lambda node, x: x * UNARY["Sigmoid"](float_attr(node, "alpha", 1.0) * x),
}


@dataclass(frozen=True, eq=False)
class Response:
    """`end` as a function of `start`, the same for every element; `nodes` in order."""

    start: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64, of any shape."""
        known = {self.start: np.asarray(x, np.float64)}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                known[node.outputs[0]] = _apply(node, [_operand(v, known) for v in node.inputs if v is not None])
        return known[self.end]


def response(value: ir.Value) -> Response | None:
    """The furthest tensor that all readers of `value` lead to, as a function of `value` alone; None if they lead to none."""
    known, nodes, found = {value}, list[ir.Node](), None
    while len(nodes) < _MAX_NODES and (node := next(_next(known, nodes), None)) is not None:
        nodes.append(node)
        known.add(node.outputs[0])
        ends = [v for v in known if v.is_graph_output() or any(n not in nodes for n, _ in data_uses(v))]
        if ends == [node.outputs[0]]:
            found = Response(value, node.outputs[0], tuple(nodes))
    return found


def _next(known: set[ir.Value], nodes: list[ir.Node]) -> Iterator[ir.Node]:
    """Readers of what is known that are a function of it."""
    readers = (n for v in [n.outputs[0] for n in reversed(nodes)] + list(known) for n, _ in data_uses(v))
    return (n for n in readers if n not in nodes and _follows(n, known))


def _follows(node: ir.Node, known: set[ir.Value]) -> bool:
    if node.domain or node.op_type not in BINARY.keys() | UNARY.keys() | _SHAPED.keys():
        return False
    if is_op(node, "Cast") and int_attr(node, "to", 0) not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return False
    return all(v is None or v in known or const_scalar(v) is not None for v in node.inputs)


def _operand(value: ir.Value, known: dict[ir.Value, _Array]) -> _Array:
    return known[value] if value in known else np.asarray(const_scalar(value), np.float64)


def _apply(node: ir.Node, arguments: list[_Array]) -> _Array:
    if node.op_type in _SHAPED:
        return _SHAPED[node.op_type](node, arguments[0])
    return UNARY[node.op_type](arguments[0]) if node.op_type in UNARY else BINARY[node.op_type](*arguments)
