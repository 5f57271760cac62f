"""Facts about operators: constants, weight and bias slots, channel axes, data movement.

Small pure functions on `onnx_ir` nodes; nothing here edits a graph.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.ir.optable import ops_with

CONV_OPS = ops_with("convolution")
COMPUTE_OPS = ops_with("compute")
MOVEMENT_OPS = ops_with("movement")

_CONSTANT_LISTS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


# ---- operators and attributes -------------------------------------------------------------------------------------


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True if `node` is one of the standard-domain operators `op_types`."""
    return node is not None and node.op_type in op_types and node.domain == ""


def is_compute(node: ir.Node) -> bool:
    """True for the GEMM and convolution class: MatMul, Gemm, Conv, ConvTranspose."""
    return node.op_type in COMPUTE_OPS and node.domain == ""


def is_data_movement(node: ir.Node) -> bool:
    """True if every output element is a copy of an input element (or a pad constant)."""
    return node.op_type in MOVEMENT_OPS and node.domain == ""


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """Integer attribute `name`, or `default` when absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_int()


def ints_attr(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Integer-list attribute `name`, or None when absent."""
    attr = node.attributes.get(name)
    return None if attr is None else tuple(attr.as_ints())


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """Float attribute `name`, or `default` when absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_float()


def str_attr(node: ir.Node, name: str, default: str) -> str:
    """String attribute `name`, or `default` when absent."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_string()


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs that an If, a Loop or a Scan holds."""
    graphs = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    lists = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPHS]
    return [*(a.as_graph() for a in graphs), *(g for a in lists for g in a.as_graphs())]


def input_at(node: ir.Node, slot: int) -> ir.Value | None:
    """Input `slot`, or None when the optional input is missing."""
    return node.inputs[slot] if slot < len(node.inputs) else None


# ---- constants ----------------------------------------------------------------------------------------------------


def resolve_identity(value: ir.Value) -> ir.Value:
    """The value behind a chain of Identity nodes."""
    producer = value.producer()
    while producer is not None and is_op(producer, "Identity") and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def const_value(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node, through Identity; None if `value` is computed.

    Casts, Transposes and DequantizeLinear of a constant are not resolved: canonicalize folds them.
    """
    if value is None:
        return None
    source = resolve_identity(value)
    if source.const_value is not None:
        return source.const_value
    producer = source.producer()
    return _constant_tensor(producer) if producer is not None and is_op(producer, "Constant") else None


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name == "value":
            return cast(ir.TensorProtocol, attr.value)  # as_tensor() costs 0.2 ms: it checks a runtime protocol
        if name in _CONSTANT_LISTS:
            return ir.tensor(np.asarray(attr.value, dtype=_CONSTANT_LISTS[name]))
    return None


def is_const(value: ir.Value | None) -> bool:
    """True if `const_value` finds a tensor."""
    return const_value(value) is not None


def const_array(value: ir.Value | None) -> NDArray | None:
    """The constant behind `value` as numpy (shape and dtype of the tensor; do not write into it), or None."""
    tensor = const_value(value)
    return None if tensor is None else tensor.numpy()


def const_scalar(value: ir.Value | None) -> float | None:
    """The only element of a one-element numeric constant (any rank), or None."""
    tensor = const_value(value)
    if tensor is None or any(dim != 1 for dim in static_shape(value) or ()) or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(-1)[0])


def const_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """An integer constant of rank 0 or 1 as a tuple, or None."""
    tensor = const_value(value)
    if tensor is None or not tensor.dtype.is_integer() or len(static_shape(value) or ()) > 1:
        return None
    return tuple(int(v) for v in tensor.numpy().reshape(-1))


def static_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Known dimensions of `value` (None for a symbolic one), or None when the rank is unknown."""
    if value is None:
        return None
    shape = value.shape
    if shape is None:
        tensor = const_value(value)
        return None if tensor is None else tuple(int(str(dim)) for dim in tensor.shape)
    return tuple(dim if isinstance(dim, int) else None for dim in shape)


# ---- weights and channels -----------------------------------------------------------------------------------------


def weight_slot(node: ir.Node) -> int | None:
    """Input slot of the constant weight (rank >= 2) of a compute node, or None if it has none.

    MatMul: slot 1, or slot 0 when only the first input is constant; Gemm, Conv, ConvTranspose: slot 1.
    """
    if not is_compute(node):
        return None
    slots = (1, 0) if node.op_type == "MatMul" else (1,)
    constant = [slot for slot in slots if _is_weight(input_at(node, slot))]
    return constant[0] if len(constant) == 1 else None


def _is_weight(value: ir.Value | None) -> bool:
    return is_const(value) and len(static_shape(value) or ()) >= 2


def pads_zeros(conv: ir.Node) -> bool:
    """Whether a convolution or pooling reads zeros beyond the border."""
    return any(ints_attr(conv, "pads") or ()) or str_attr(conv, "auto_pad", "NOTSET").startswith("SAME")


def bias_slot(node: ir.Node) -> int | None:
    """Slot that holds the bias when there is one (Gemm, Conv, ConvTranspose: 2), None if the operator has no such slot."""
    return 2 if node.domain == "" and node.op_type in COMPUTE_OPS - {"MatMul"} else None


def output_channel_axis(node: ir.Node) -> int:
    """Non-negative axis of the weight that indexes output channels (for ConvTranspose with groups: within a group)."""
    slot, rank = _weight(node)
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if int_attr(node, "transB", 0) else 1
        case _:
            return rank - 1 if slot == 1 else rank - 2


def input_channel_axis(node: ir.Node) -> int:
    """Non-negative axis of the weight that is reduced with the activation's channels (for Conv with groups: within a group)."""
    slot, rank = _weight(node)
    match node.op_type:
        case "Conv":
            return 1
        case "ConvTranspose":
            return 0
        case "Gemm":
            return 1 if int_attr(node, "transB", 0) else 0
        case _:
            return rank - 2 if slot == 1 else rank - 1


def activation_channel_axis(node: ir.Node) -> int:
    """Axis of the activation input that holds input channels: -1 (MatMul, -2 if its weight comes first), 1 (Conv), 0/1 (Gemm)."""
    slot, _ = _weight(node)
    match node.op_type:
        case "Conv" | "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if int_attr(node, "transA", 0) else 1
        case _:
            return -1 if slot == 1 else -2


def output_activation_axis(node: ir.Node) -> int:
    """Axis of the node's output that holds output channels: -1 (MatMul, -2 if its weight comes first), 1 (Conv, Gemm)."""
    slot, _ = _weight(node)
    if node.op_type != "MatMul":
        return 1
    return -1 if slot == 1 else -2


def _weight(node: ir.Node) -> tuple[int, int]:
    slot = weight_slot(node)
    if slot is None:
        raise ModelError(f"{node.op_type} node {node.name!r} has no constant weight: call weight_slot() first")
    return slot, len(static_shape(node.inputs[slot]) or ())
