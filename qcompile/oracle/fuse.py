"""Chains of operators that are one step of an integer kernel: requantization, table look-up, sums with a bias.

A chain is fused only where nobody else reads what it makes in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qcompile.oracle.cost import bits_of
from qcompile.oracle.graph import IntegerGraph, Op
from qcompile.oracle.interval import constant

Array = NDArray[Any]
BIAS = 1 << 62


@dataclass(frozen=True)
class Layer:
    """A step of the exported network: `parameters` are constants by role, `attributes` plain values, `covers` its operators."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, Array] = field(default_factory=dict[str, Array])
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    covers: tuple[str, ...] = ()


class Fuser:
    """Finds chains around the operators of one graph."""

    def __init__(self, graph: IntegerGraph) -> None:
        self.constants = graph.constants
        self.makers = {out: op for op in graph.ops for out in op.outputs if out}
        self._readers: dict[str, list[Op]] = {}
        self._uses = Counter(graph.results)
        for op in graph.ops:
            for name in op.inputs:
                self._readers.setdefault(name, []).append(op)
                self._uses[name] += 1

    def constant_beside(self, op: Op) -> tuple[str, Array] | None:
        """(the other input, the constant) of an operator on two tensors; of Add and Mul either may be the constant."""
        order = (1, 0) if op.type in ("Add", "Mul") else (1,)
        for slot in order:
            if len(op.inputs) == 2 and (found := self.constants.get(op.inputs[slot])) is not None:
                return op.inputs[1 - slot], found
        return None

    def behind(self, name: str, *types: str) -> Op | None:
        """The only reader of `name`, if it is one of these operators."""
        readers = self._readers.get(name, [])
        return readers[0] if self._uses[name] == 1 and readers and readers[0].type in types else None

    def before(self, name: str, *types: str) -> Op | None:
        """The operator that makes `name` for one reader only, if it is one of these."""
        op = self.makers.get(name)
        return op if op is not None and op.type in types and self._uses[name] == 1 else None


def layers(graph: IntegerGraph) -> list[Layer]:
    """The graph as layers: `conv`, `matmul`, `requantize`, `table`, and ONNX operators (in lower case) for the rest."""
    fuser = Fuser(graph)
    fused: dict[str, Layer] = {}
    for op in graph.ops:
        found = _fused(fuser, op)
        if found is not None and not any(name in fused for name in found.covers):
            fused |= dict.fromkeys(found.covers, found)
    return _ordered(graph, fused)


def _ordered(graph: IntegerGraph, fused: Mapping[str, Layer]) -> list[Layer]:
    """Each layer where its last operator stood."""
    last = {layer.covers[-1]: layer for layer in fused.values()}
    made = [last.get(op.outputs[0]) if op.outputs[0] in fused else _plain(op) for op in graph.ops]
    return [layer for layer in made if layer is not None]


def _plain(op: Op) -> Layer:
    return Layer(op.name, op.type.lower(), op.inputs, op.outputs, attributes=dict(op.attributes), covers=(op.outputs[0],))


def _fused(fuser: Fuser, op: Op) -> Layer | None:
    if op.type == "BitShift":
        return _requantize(fuser, op)
    if op.type == "Gather":
        return _table(fuser, op)
    return _weighted(fuser, op) if op.type in ("ConvInteger", "MatMulInteger") else None


# ---- sums of products ---------------------------------------------------------------------------------------------


def _weighted(fuser: Fuser, op: Op) -> Layer | None:
    """acc = conv(x - x_zero_point, weight - w_zero_point) + bias, in int32."""
    roles = ("weight", "x_zero_point", "w_zero_point")
    found = {role: fuser.constants.get(name) for role, name in zip(roles, op.inputs[1:], strict=False) if name}
    if any(v is None for v in found.values()):
        return None
    parameters = {role: v for role, v in found.items() if v is not None}
    covers, output = [op], op.outputs[0]
    add = fuser.behind(output, "Add")
    beside = None if add is None else fuser.constant_beside(add)
    if add is not None and beside is not None:
        covers, output = [op, add], add.outputs[0]
        parameters["bias"] = beside[1]
    name = "conv" if op.type == "ConvInteger" else "matmul"
    attributes = {**op.attributes, "weight_bits": bits_of(constant(parameters["weight"]))}
    return Layer(op.name, name, op.inputs[:1], (output,), parameters, attributes, _names(covers))


# ---- requantization -----------------------------------------------------------------------------------------------


def _requantize(fuser: Fuser, shift: Op) -> Layer | None:
    """y = clip((((x - x_zero_point) * m + offset + 2^(e-1)) >> e) + zero_point, low, high), >> an arithmetic shift."""
    e = fuser.constants.get(shift.inputs[1])
    core = None if e is None or shift.attributes["direction"] != "RIGHT" else _arithmetic_shift(fuser, shift, e)
    if core is None or e is None:
        return None
    parameters: dict[str, Array] = {"e": e}
    source, head = _head(fuser, core[0], e, parameters)
    output, tail, dtype = _tail(fuser, core[-1].outputs[0], parameters)
    covers = _names([*reversed(head), *core, *tail])
    return Layer(core[-1].name, "requantize", (source,), (output,), parameters, {"dtype": dtype}, covers)


def _arithmetic_shift(fuser: Fuser, shift: Op, e: Array) -> list[Op] | None:
    """The five operators of x >> e: add 2^62, as uint64, shift, as int64, subtract 2^(62-e)."""
    down, up = fuser.before(shift.inputs[0], "Cast"), fuser.behind(shift.outputs[0], "Cast")
    add = None if down is None else fuser.before(down.inputs[0], "Add")
    sub = None if up is None else fuser.behind(up.outputs[0], "Sub")
    if down is None or up is None or add is None or sub is None:
        return None
    raised, lowered = fuser.constant_beside(add), fuser.constants.get(sub.inputs[1])
    types = down.attributes["to"] == TensorProto.UINT64 and up.attributes["to"] == TensorProto.INT64
    if not types or raised is None or lowered is None or not (raised[1] == BIAS).all():
        return None
    return [add, down, shift, up, sub] if np.array_equal(lowered, np.right_shift(np.int64(BIAS), e.astype(np.int64))) else None


def _head(fuser: Fuser, add: Op, e: Array, parameters: dict[str, Array]) -> tuple[str, list[Op]]:
    """What leads into the shift, absorbed backwards: rounding, a constant, the multiplier, the zero point, the cast."""
    beside = fuser.constant_beside(add)
    assert beside is not None
    name, taken = beside[0], list[Op]()
    half = np.left_shift(np.int64(1), e.astype(np.int64) - 1)
    steps = (("rounding", "Add"), ("offset", "Add"), ("m", "Mul"), ("x_zero_point", "Sub"))
    for role, kind in steps:
        op = fuser.before(name, kind)
        found = None if op is None else fuser.constant_beside(op)
        if op is None or found is None or (role == "rounding" and not np.array_equal(found[1], half)):
            continue
        name, taken = found[0], [*taken, op]
        parameters[role] = found[1]
    cast = fuser.before(name, "Cast")
    return (cast.inputs[0], [*taken, cast]) if cast is not None and _widens(cast) else (name, taken)


def _widens(cast: Op) -> bool:
    return cast.attributes["to"] == TensorProto.INT64


def _tail(fuser: Fuser, name: str, parameters: dict[str, Array]) -> tuple[str, list[Op], int]:
    """What follows the shift: the zero point, the limits, the cast to the stored type."""
    taken, dtype = list[Op](), int(TensorProto.INT64)
    add = fuser.behind(name, "Add")
    beside = None if add is None else fuser.constant_beside(add)
    if add is not None and beside is not None and not (beside[1] == BIAS).all():
        parameters["zero_point"] = beside[1]
        taken, name = [add], add.outputs[0]
    clip = fuser.behind(name, "Clip")
    ends = [] if clip is None else [fuser.constants.get(n) for n in clip.inputs[1:]]
    if clip is not None and len(ends) == 2 and all(end is not None for end in ends):
        parameters |= {role: end for role, end in zip(("low", "high"), ends, strict=True) if end is not None}
        taken, name = [*taken, clip], clip.outputs[0]
    cast = fuser.behind(name, "Cast")
    if cast is not None and taken:
        taken, name, dtype = [*taken, cast], cast.outputs[0], int(cast.attributes["to"])
    return name, taken, dtype


# ---- tables -------------------------------------------------------------------------------------------------------


def _table(fuser: Fuser, op: Op) -> Layer | None:
    """y = values[x + offset]."""
    values = fuser.constants.get(op.inputs[0])
    if values is None or values.ndim != 1 or op.attributes.get("axis", 0):
        return None
    name, taken, parameters = op.inputs[1], list[Op](), {"values": values}
    add = fuser.before(name, "Add")
    beside = None if add is None else fuser.constant_beside(add)
    if add is not None and beside is not None:
        name, taken, parameters = beside[0], [add], {**parameters, "offset": beside[1]}
    cast = fuser.before(name, "Cast")
    if cast is not None and _widens(cast):
        name, taken = cast.inputs[0], [*taken, cast]
    return Layer(op.name, "table", (name,), op.outputs, parameters, {}, _names([*reversed(taken), op]))


def _names(ops: list[Op]) -> tuple[str, ...]:
    return tuple(op.outputs[0] for op in ops)
