"""Which types an operator takes and makes, as its schema says: in its version, that is of the model's opset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir

_LITERAL = "tensor("


@dataclass(frozen=True)
class Signature:
    """The types of one operator.

    `inputs`, `outputs`: for each formal parameter the name of its type variable, or a type; the last one repeats where it is
    variadic (`mixed`: each of them of a type of its own).  `allowed`: what a variable may be, as `tensor(float16)`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mixed: tuple[bool, bool]
    allowed: Mapping[str, frozenset[str]]
    attributes: frozenset[str]

    def variable(self, slot: int) -> str | None:
        """The variable (or type) of input `slot` (>= 0) or output `~slot`; None beyond the parameters."""
        names, mixed = (self.inputs, self.mixed[0]) if slot >= 0 else (self.outputs, self.mixed[1])
        position = slot if slot >= 0 else ~slot
        if not names:
            return None
        name = names[min(position, len(names) - 1)]
        return f"{name} {slot}" if mixed and position >= len(names) - 1 else name

    def takes(self, slot: int, dtype: ir.DataType) -> bool:
        """Whether a tensor of `dtype` may stand there."""
        name = self.variable(slot)
        return name is not None and type_name(dtype) in self.allowed.get(name.split(" ")[0], {name})

    def only(self, slot: int, kind: str) -> bool:
        """Whether nothing but types that start with `kind` may stand there, as `seq(`."""
        name = (self.variable(slot) or "").split(" ")[0]
        return all(text.startswith(kind) for text in self.allowed.get(name, {name}))


def type_name(dtype: ir.DataType) -> str:
    """How schemas spell a tensor of `dtype`."""
    return f"{_LITERAL}{dtype.name.lower()})"


def signature(node: ir.Node, opsets: Mapping[str, int]) -> Signature | None:
    """The types of `node` in a model of these opsets; None where no schema is known (plugins, ONNX Runtime's own domain)."""
    return _signature(node.op_type, opsets.get(node.domain, 1), node.domain)


@cache
def _signature(op_type: str, version: int, domain: str) -> Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    ends = (schema.inputs, schema.outputs)
    inputs, outputs = (tuple(p.type_str for p in end) for end in ends)
    mixed = (_mixed(schema.inputs), _mixed(schema.outputs))
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    return Signature(inputs, outputs, mixed, allowed, frozenset(schema.attributes))


def _mixed(parameters: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
    return bool(parameters) and not parameters[-1].is_homogeneous


def is_tensor(value: ir.Value | None) -> bool:
    """Whether `value` is no sequence and no optional one."""
    return value is not None and (value.type is None or isinstance(value.type, ir.TensorType | ir.SparseTensorType))


def complete_types(graph: ir.Graph, opsets: Mapping[str, int]) -> None:
    """Tensors whose type nothing told (they stand behind operators without a schema) take the one that their readers ask for."""
    unknown = [n for n in graph if any(v is not None and v.type is None for v in (*n.inputs, *n.outputs))]
    while sum(_bind(node, opsets) for node in unknown):
        pass


def _bind(node: ir.Node, opsets: Mapping[str, int]) -> bool:
    """Whether a type variable told one tensor's type by another's."""
    known = signature(node, opsets)
    if known is None:
        return False
    slots = [(known.variable(i), v) for i, v in enumerate(node.inputs)] + [
        (known.variable(~i), v) for i, v in enumerate(node.outputs)
    ]
    types = {name: v.type for name, v in slots if name is not None and v is not None and v.type is not None and is_tensor(v)}
    types |= {name: ir.TensorType(dtype) for name, _ in slots if (dtype := _fixed(name)) is not None}
    open_ends = [(v, types[name]) for name, v in slots if name in types and v is not None and v.type is None and v.name]
    for value, found in open_ends:
        value.type = found
    return bool(open_ends)


def _fixed(name: str | None) -> ir.DataType | None:
    """The type that a parameter without a variable has."""
    if name is None or not name.startswith(_LITERAL):
        return None
    return ir.DataType.__members__.get(name.removeprefix(_LITERAL).removesuffix(")").upper())
