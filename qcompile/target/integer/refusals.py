"""Why a single node has no integer form."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.ir.ops import (
    const_array,
    const_ints,
    input_at,
    int_attr,
    ints_attr,
    is_const,
    is_op,
    static_shape,
    str_attr,
    weight_slot,
)


def refusal(node: ir.Node) -> str | None:
    """A reason that completes "node N has no integer form: ...", or None."""
    if node.domain:
        return f"operator {node.domain}.{node.op_type} is not a standard one"
    if node.attributes and any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "it holds a subgraph"
    check = _CHECKS.get(node.op_type)
    return check(node) if check is not None else None


def _linear(node: ir.Node) -> str | None:
    slot = weight_slot(node)
    if is_op(node, "MatMul") and any(is_const(v) and len(static_shape(v) or ()) < 2 for v in node.inputs):
        return "its constant operand is not a 2-D weight"
    if slot is None:
        return None if is_op(node, "MatMul") else "its weight is computed, not constant"
    if slot != 1:
        return "its constant operand stands on the left"
    if is_op(node, "MatMul") and len(static_shape(node.inputs[1]) or ()) != 2:
        return "its constant operand is not a 2-D weight"
    if is_op(node, "Gemm") and int_attr(node, "transA", 0):
        return "its activation is transposed"
    bias = input_at(node, 2)
    return "its bias is computed, not constant" if bias is not None and not is_const(bias) else None


def _clip(node: ir.Node) -> str | None:
    bounds = [const_array(b) for slot in (1, 2) if (b := input_at(node, slot)) is not None]
    return "its bounds are computed, not constant" if any(b is None or b.size != 1 for b in bounds) else None


def _average(node: ir.Node) -> str | None:
    if int_attr(node, "ceil_mode", 0) or str_attr(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its windows are cut at the border (ceil_mode or auto_pad), so that the divisor varies"
    if any(ints_attr(node, "pads") or ()) and not int_attr(node, "count_include_pad", 0):
        return "its divisor varies at the border (count_include_pad=0 with padding)"
    shape = static_shape(node.inputs[0])
    return None if shape and len(shape) > 2 and shape[1] else "its number of channels is unknown"


def _maxpool(node: ir.Node) -> str | None:
    return "it returns indices" if len(node.outputs) > 1 else None


def _reduce(node: ir.Node) -> str | None:
    shape = static_shape(node.inputs[0])
    axes = None if shape is None else reduced_axes(node, len(shape))
    if shape is None or axes is None:
        return "its axes, or the rank of its input, are not known before run time"
    if is_op(node, "ReduceMean", "GlobalAveragePool") and not all(shape[a] for a in axes):
        return "it averages over an axis of unknown length"
    return None


def reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """Non-negative axes of a mean, sum or extreme; None if they are computed."""
    if is_op(node, "GlobalAveragePool", "GlobalMaxPool"):
        return tuple(range(2, rank))
    given = input_at(node, 1)
    axes = const_ints(given) if given is not None else ints_attr(node, "axes") or tuple(range(rank))
    return None if axes is None else tuple(a % rank for a in axes)


def _pad(node: ir.Node) -> str | None:
    value = input_at(node, 2)
    return "its padding value is computed, not constant" if value is not None and not is_const(value) else None


def _resize(node: ir.Node) -> str | None:
    mode = str_attr(node, "mode", "nearest")
    return None if mode == "nearest" else f"{mode} interpolation computes in float; only nearest copies codes"


def _cast(node: ir.Node) -> str | None:
    if node.outputs[0].dtype is None or node.outputs[0].dtype.is_floating_point() or not _of_floats(node):
        return None
    return "it makes integers of numbers computed in float; with shapes known (export without dynamic axes) many such are folded"


def _of_floats(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


_CHECKS: dict[str, Callable[[ir.Node], str | None]] = {
    "MatMul": _linear, "Gemm": _linear, "Conv": _linear, "Clip": _clip, "AveragePool": _average, "MaxPool": _maxpool,
    "ReduceMean": _reduce, "ReduceSum": _reduce, "GlobalAveragePool": _reduce, "GlobalMaxPool": _reduce,
    "ReduceMax": _reduce, "ReduceMin": _reduce, "Cast": _cast, "Pad": _pad, "Resize": _resize,
}  # fmt: skip
