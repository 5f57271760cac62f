"""Run an integer graph: `run_integer` on codes, `encode` and `decode` at its borders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompile.errors import DataError, GateError, ModelError
from qcompile.oracle.checked import Overflow, require_integers
from qcompile.oracle.elementwise import ELEMENTWISE, Kernel
from qcompile.oracle.graph import Border, IntegerGraph, Op, integer_graph
from qcompile.oracle.linear import LINEAR
from qcompile.oracle.movement import MOVEMENT, REDUCTIONS
from qcompile.oracle.qlinear import QLINEAR

Array = NDArray[Any]
KERNELS: dict[str, Kernel] = {**ELEMENTWISE, **MOVEMENT, **REDUCTIONS, **LINEAR, **QLINEAR}
OPERATORS = frozenset(KERNELS)


def run_integer(model: onnx.ModelProto | IntegerGraph, codes: Mapping[str, Array]) -> dict[str, Array]:
    """Result codes of an integer-only model, computed with numpy integers; every tensor is checked to be integer or bool.

    Args:
        model: Q/DQ at the borders, integer operators in between.
        codes: the integer tensors behind the QuantizeLinear nodes, and the integer inputs, by name (`encode` makes them).

    Returns:
        The integer tensors before the DequantizeLinear nodes, and the integer outputs, by name.

    Raises:
        ModelError: the graph holds an operator that the oracle does not know, or its borders are not Q and DQ.
        DataError: a code tensor is missing.
        GateError: an operation overflows, divides by zero, or shifts or gathers out of range; the message names the node.
    """
    graph = model if isinstance(model, IntegerGraph) else integer_graph(model)
    values: dict[str, Array] = dict(graph.constants)
    values |= {name: require_integers(_given(codes, name)) for name in graph.sources}
    left = Counter(name for op in graph.ops for name in op.inputs)
    keep = set(graph.results)
    for op in graph.ops:
        values |= zip(op.outputs, _apply(op, [values[n] if n else None for n in op.inputs]), strict=False)
        left.subtract(op.inputs)
        for name in set(op.inputs):
            if not left[name] and name not in keep:
                values.pop(name, None)
    return {name: values[name] for name in graph.results}


def _given(codes: Mapping[str, Array], name: str) -> Array:
    if name not in codes:
        raise DataError(f"codes for {name!r} are missing; `encode` makes them from the model's inputs")
    return np.asarray(codes[name])


def _apply(op: Op, inputs: list[Array | None]) -> list[Array]:
    kernel = KERNELS.get(op.type)
    if kernel is None:
        raise ModelError(f"the integer oracle has no {op}; `qcompile check --target integer` lists what may stay")
    try:
        return [require_integers(out) for out in kernel(op, inputs)]
    except Overflow as error:
        raise GateError(f"{op}: {error}; `qcompile check --target integer` shows the bounds of every node") from error


def encode(model: onnx.ModelProto | IntegerGraph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The codes of the model's inputs: clip(rint(x / scale) + zero_point) in float32, half to even, as QuantizeLinear.

    Raises:
        DataError: an input is missing.
    """
    graph = model if isinstance(model, IntegerGraph) else integer_graph(model)
    coded = {e.codes: _quantize(e, _feed(feeds, e.outer)) for e in graph.entries}
    return coded | {name: _feed(feeds, name) for name in graph.inputs}


def _feed(feeds: Mapping[str, Array], name: str) -> Array:
    if name not in feeds:
        raise DataError(f"input {name!r} is missing in the data (it has {', '.join(feeds)}); add it")
    return np.asarray(feeds[name])


def _quantize(border: Border, x: Array) -> Array:
    info = np.iinfo(border.dtype)
    scale, zero = border.along(border.scale, x.ndim), border.along(border.zero_point, x.ndim)
    with np.errstate(over="ignore"):
        ratio = np.divide(x, scale, dtype=np.float32)
    codes = np.rint(np.clip(ratio, (info.min - zero).astype(np.float32), (info.max - zero).astype(np.float32)))
    return (codes.astype(np.int64) + zero).astype(border.dtype)


def decode(model: onnx.ModelProto | IntegerGraph, codes: Mapping[str, Array]) -> dict[str, Array]:
    """The model's outputs: (code - zero_point) * scale in float32, as DequantizeLinear, in their own types."""
    graph = model if isinstance(model, IntegerGraph) else integer_graph(model)
    reals = {e.outer: _dequantize(e, codes[e.codes]).astype(e.real, copy=False) for e in graph.exits}
    return reals | {name: codes[name] for name in graph.outputs}


def _dequantize(border: Border, codes: Array) -> NDArray[np.float32]:
    scale, zero = border.along(border.scale, codes.ndim), border.along(border.zero_point, codes.ndim)
    return np.multiply(codes.astype(np.int64) - zero, scale, dtype=np.float32)
