"""Activation functions, single operators or decomposed, recognised by evaluating them on a few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir import ops
from qcompile.structure.core import Matches, once, only_use

ActivationKind = Literal[
    "gelu-erf",
    "gelu-tanh",
    "quick-gelu",
    "silu",
    "relu",
    "relu6",
    "leaky-relu",
    "prelu",
    "hard-swish",
    "mish",
    "elu",
    "sigmoid",
    "tanh",
]
_Array = NDArray[np.float64]
_SQRT2 = np.sqrt(2.0)
_X = np.array([-6.0, -3.3, -1.7, -0.75, -0.3, 0.0, 0.2, 0.9, 1.6, 2.9, 5.5])
_TOLERANCE = 2e-5
_MAX_NODES = 16

_DIRECT: dict[str, ActivationKind] = {
    "Relu": "relu",
    "LeakyRelu": "leaky-relu",
    "PRelu": "prelu",
    "HardSwish": "hard-swish",
    "Mish": "mish",
    "Elu": "elu",
}


def _erf(x: _Array) -> _Array:
    return np.array([math.erf(v) for v in np.ravel(x)]).reshape(np.shape(x))


def _sigmoid(x: _Array) -> _Array:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def gelu_tanh(x: _Array) -> _Array:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_REFERENCES: dict[ActivationKind, Callable[[_Array], _Array]] = {
    "gelu-erf": lambda x: 0.5 * x * (1 + _erf(x / _SQRT2)),
    "gelu-tanh": gelu_tanh,
    "quick-gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "hard-swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}

_SAMPLES: dict[ActivationKind, _Array] = {kind: reference(_X) for kind, reference in _REFERENCES.items()}

UNARY: dict[str, Callable[[_Array], _Array]] = {
    "Erf": _erf,
    "Exp": np.exp,
    "Identity": lambda x: x,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sigmoid": _sigmoid,
    "Softplus": lambda x: np.logaddexp(0, x),
    "Tanh": np.tanh,
}
BINARY: dict[str, Callable[[_Array, _Array], _Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}
_CORES = ("Erf", "Tanh", "Sigmoid", "HardSigmoid")


@dataclass(frozen=True)
class Activation:
    """output = f(input), element by element; `nodes` in graph order, the last one makes `output`."""

    kind: ActivationKind
    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def node(self) -> ir.Node:
        """The node that makes the output."""
        return self.nodes[-1]


@once
def find_activations(graph: ir.Graph) -> Matches[Activation]:
    """All activation functions of the main graph; a Sigmoid or Tanh inside a larger known function is not listed on its own."""
    return Matches(tuple(found for node in graph if (found := match_activation(node)) is not None))


def match_activation(node: ir.Node) -> Activation | None:
    """The activation function whose operator, or whose Erf, Tanh or Sigmoid, is `node`."""
    kind = _direct_kind(node)
    x = ops.input_at(node, 0)
    if x is None:
        return None
    if kind is not None:
        return Activation(kind, x, node.outputs[0], (node,))
    if not ops.is_op(node, *_CORES):
        return None
    return _decomposed(node) or _bare(node, x)


def _direct_kind(node: ir.Node) -> ActivationKind | None:
    if node.op_type == "Gelu" and node.domain in ("", "com.microsoft"):
        return "gelu-tanh" if ops.str_attr(node, "approximate", "none") == "tanh" else "gelu-erf"
    if node.op_type == "FastGelu" and node.domain == "com.microsoft" and len(node.inputs) == 1:
        return "gelu-tanh"
    if node.op_type in ("QuickGelu", "Swish") and node.domain in ("", "com.microsoft"):
        return _swish_kind(ops.float_attr(node, "alpha", 1.0 if node.op_type == "Swish" else 1.702))
    if ops.is_op(node, "Clip"):
        bounds = [ops.const_scalar(ops.input_at(node, slot)) for slot in (1, 2)]
        return "relu6" if bounds == [0.0, 6.0] else None
    return _DIRECT.get(node.op_type) if node.domain == "" else None


def _swish_kind(alpha: float) -> ActivationKind | None:
    kinds: dict[float, ActivationKind] = {1.0: "silu", 1.702: "quick-gelu"}
    return kinds.get(round(alpha, 4))


def _bare(node: ir.Node, x: ir.Value) -> Activation | None:
    kinds: dict[str, ActivationKind] = {"Sigmoid": "sigmoid", "Tanh": "tanh"}
    kind = kinds.get(node.op_type)
    return None if kind is None else Activation(kind, x, node.outputs[0], (node,))


def _decomposed(core: ir.Node) -> Activation | None:
    """The longest chain behind `core` that, as a function of one value in front of it, is a known activation."""
    inputs = tuple(_inputs_before(core))
    for output in reversed(tuple(_outputs_behind(core))):
        for x in inputs:
            kind, nodes = _classify(x, output)
            if kind is not None:
                return Activation(kind, x, output, nodes)
    return None


def _outputs_behind(core: ir.Node) -> Iterator[ir.Value]:
    value = core.outputs[0]
    for _ in range(4):
        use = only_use(value)
        if use is None or not ops.is_op(use[0], "Add", "Mul", "Div"):
            return
        value = use[0].outputs[0]
        yield value


def _inputs_before(core: ir.Node) -> Iterator[ir.Value]:
    """Values that the argument of `core` may be a function of, nearest first."""
    queue, seen = [core.inputs[0]], set[ir.Value]()
    while queue and len(seen) < _MAX_NODES:
        value = queue.pop(0)
        if value is None or value in seen or ops.is_const(value):
            continue
        seen.add(value)
        yield value
        node = value.producer()
        if node is not None and _is_elementwise(node):
            queue.extend(node.inputs)


def _is_elementwise(node: ir.Node) -> bool:
    if node.domain or node.op_type not in BINARY.keys() | UNARY.keys() | {"HardSigmoid"}:
        return False
    return all(not ops.is_const(v) or ops.const_scalar(v) is not None for v in node.inputs)


def _classify(x: ir.Value, output: ir.Value) -> tuple[ActivationKind | None, tuple[ir.Node, ...]]:
    nodes: dict[ir.Node, None] = {}
    with np.errstate(all="ignore"):
        y = _evaluate(output, x, nodes)
    if y is None or not nodes:
        return None, ()
    for kind, values in _SAMPLES.items():
        if np.abs(y - values).max() < _TOLERANCE:
            return kind, tuple(nodes)
    return None, ()


def _evaluate(value: ir.Value | None, x: ir.Value, nodes: dict[ir.Node, None]) -> _Array | None:
    """`value` as a function of `x` on the sample points, None if it depends on anything else; adds the nodes on the way."""
    if value is x:
        return _X
    constant = ops.const_scalar(value)
    if constant is not None:
        return np.full_like(_X, constant)
    node = None if value is None else value.producer()
    if node is None or not _is_elementwise(node) or len(nodes) > _MAX_NODES:
        return None
    arguments = [_evaluate(v, x, nodes) for v in node.inputs]
    known = [a for a in arguments if a is not None]
    if len(known) < len(arguments):
        return None
    nodes[node] = None
    return _apply(node, known)


def _apply(node: ir.Node, arguments: list[_Array]) -> _Array | None:
    if node.op_type == "HardSigmoid":
        return np.clip(ops.float_attr(node, "alpha", 0.2) * arguments[0] + ops.float_attr(node, "beta", 0.5), 0, 1)
    if len(arguments) == 1 and node.op_type in UNARY:
        return UNARY[node.op_type](arguments[0])
    return BINARY[node.op_type](arguments[0], arguments[1]) if len(arguments) == 2 else None
