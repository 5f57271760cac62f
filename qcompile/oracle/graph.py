"""IntegerGraph: the integer part of a model, between its QuantizeLinear and DequantizeLinear borders."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from qcompile.errors import ModelError

Array = NDArray[Any]
MIN_OPSET = 18  # axes of the reductions are inputs from here on
DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Op:
    """An operator of the integer part; a missing optional input is ""."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.type} {self.name!r}"


@dataclass(frozen=True)
class Border:
    """A QuantizeLinear at a float input, or a DequantizeLinear at a float output.

    `outer` is the float tensor of the graph's interface, `codes` the integer tensor; value = (code - zero_point) * scale.
    `scale` and `zero_point` are numbers, or lists along `axis`.  `real` is the type of `outer`: a Cast may stand between it and
    float32.
    """

    name: str
    outer: str
    codes: str
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    dtype: np.dtype[Any]
    axis: int = 1
    real: type[Any] = np.float32

    def along(self, values: Array, rank: int) -> Array:
        """The scale or the zero point in the shape that broadcasts to a tensor of `rank` axes."""
        if values.size == 1:
            return values.reshape(())
        return values.reshape([-1 if i == self.axis % rank else 1 for i in range(rank)])


@dataclass(frozen=True)
class IntegerGraph:
    """`ops` in topological order, `constants` by name, the borders, and the integer inputs and outputs of the interface.

    Code tensors that `run_integer` reads are those of `entries` and `inputs`; those that it makes are of `exits` and `outputs`.
    """

    ops: tuple[Op, ...]
    constants: Mapping[str, Array]
    entries: tuple[Border, ...]
    exits: tuple[Border, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the integer tensors that must be given."""
        return (*(e.codes for e in self.entries), *self.inputs)

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the integer tensors that come out."""
        return tuple(dict.fromkeys((*(e.codes for e in self.exits), *self.outputs)))


def integer_graph(model: onnx.ModelProto, base_dir: str = "") -> IntegerGraph:
    """Split `model` at its borders; external data is read from `base_dir`.

    Raises:
        ModelError: the model's opset is below 18, a border's scale is computed, or a float tensor is neither an input that
            only QuantizeLinear reads nor an output that DequantizeLinear makes.
    """
    opset = next((o.version for o in model.opset_import if o.domain in DOMAINS), 0)
    if opset < MIN_OPSET:
        raise ModelError(
            f"the integer oracle reads opset {MIN_OPSET} and later, this model has {opset}; compile it with --target integer"
        )
    constants = _constants(model.graph, base_dir)
    given = {i.name: i.type.tensor_type.elem_type for i in model.graph.input if i.name not in constants}
    made = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    nodes = [n for n in model.graph.node if n.op_type != "Constant"]
    constants |= _unpacked(nodes, constants)
    casts = border_casts(nodes, given, made)
    nodes = [n for n in nodes if n not in casts]
    entered = {n.output[0]: n.input[0] for n in casts if n.input[0] in given}
    left = {n.input[0]: n.output[0] for n in casts if n.output[0] in made}
    quantizers, dequantizers = ([n for n in nodes if n.op_type == f"{q}Linear"] for q in ("Quantize", "Dequantize"))
    entries = [_border(n, constants, entered.get(n.input[0], n.input[0]), n.output[0], given) for n in quantizers]
    exits = [_border(n, constants, left.get(n.output[0], n.output[0]), n.input[0], made) for n in dequantizers]
    read = {name for n in model.graph.node for name in n.input}
    _require_interface("input", {n: t for n, t in given.items() if n in read}, [e.outer for e in entries], "QuantizeLinear")
    _require_interface("output", made, [e.outer for e in exits], "DequantizeLinear")
    borders = ("QuantizeLinear", "DequantizeLinear")
    ops = tuple(_op(n) for n in nodes if n.op_type not in borders and n.output[0] not in constants)
    inputs = tuple(n for n, t in given.items() if t not in FLOATS)
    outputs = tuple(n for n, t in made.items() if t not in FLOATS)
    return IntegerGraph(
        ops, constants, tuple(entries), tuple(exits), inputs, outputs, {p.key: p.value for p in model.metadata_props}
    )


def border_casts(nodes: Sequence[NodeProto], inputs: Container[str], outputs: Container[str]) -> list[NodeProto]:
    """The Casts between an input or output of the model and its Q or DQ."""
    quantized = {n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    made = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
    casts = [n for n in nodes if n.op_type == "Cast"]
    enters = (n for n in casts if n.input[0] in inputs and n.output[0] in quantized)
    return [*enters, *(n for n in casts if n.input[0] in made and n.output[0] in outputs)]


FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


def _constants(graph: onnx.GraphProto, base_dir: str) -> dict[str, Array]:
    found = {t.name: numpy_helper.to_array(t, base_dir) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = _constant_value(node)
    return found


def _unpacked(nodes: list[NodeProto], constants: Mapping[str, Array]) -> dict[str, Array]:
    """Weights stored as INT4 are their int8 codes: the Cast that widens them is storage, not arithmetic."""
    casts = (n for n in nodes if n.op_type == "Cast" and n.input[0] in constants)
    packed = (n for n in casts if constants[n.input[0]].dtype.name == "int4" and _attributes(n)["to"] == TensorProto.INT8)
    return {n.output[0]: constants[n.input[0]].astype(np.int8) for n in packed}


def _constant_value(node: NodeProto) -> Array:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, np.float32 if "float" in attribute.name else np.int64)


def _op(node: NodeProto) -> Op:
    return Op(node.name or node.output[0], node.op_type, tuple(node.input), tuple(node.output), _attributes(node))


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: _attribute(a) for a in node.attribute}


def _attribute(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _border(node: NodeProto, constants: Mapping[str, Array], outer: str, codes: str, interface: Mapping[str, int]) -> Border:
    scale = constants.get(node.input[1])
    if scale is None:
        raise ModelError(
            f"{node.op_type} {node.name!r} at the border needs a constant scale; compile again with --target integer"
        )
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    dtype = _code_type(node) if zero is None else zero.dtype
    point = np.zeros((), np.int64) if zero is None else zero.astype(np.int64)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    real = np.dtype(helper.tensor_dtype_to_np_dtype(interface.get(outer, TensorProto.FLOAT))).type
    return Border(node.name or codes, outer, codes, scale.astype(np.float32), point, dtype, axis, real)


def _code_type(node: NodeProto) -> np.dtype[Any]:
    """Of a border without a zero point: `output_dtype`, else uint8 (what a DequantizeLinear reads is not needed)."""
    to = next((a.i for a in node.attribute if a.name == "output_dtype"), TensorProto.UINT8)
    return np.dtype(helper.tensor_dtype_to_np_dtype(to))


def _require_interface(kind: str, types: Mapping[str, int], bordered: list[str], op_type: str) -> None:
    """Every float tensor of the interface has its border there, and no border stands anywhere else."""
    floats = {name for name, t in types.items() if t in FLOATS}
    for name in floats - set(bordered):
        raise ModelError(f"float {kind} {name!r} has no {op_type} at the border; compile the model with --target integer")
    for name in set(bordered) - floats:
        raise ModelError(f"{op_type} at {name!r} is not at a float {kind} of the model; compile the model with --target integer")
