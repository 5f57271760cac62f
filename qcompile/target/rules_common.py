"""Rules about Q/DQ nodes that hold for every target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from qcompile.target.findings import Context, Hits, scale_of
from qcompile.target.view import DEQUANTIZE_OPS


def scale_not_constant(c: Context) -> Hits:
    """A scale is computed in the graph."""
    for node in c.quantizers:
        if not c.view.is_constant(node.input[1]):
            yield node.name, f"the scale {node.input[1]!r} is computed at run time"


def scale_not_positive(c: Context) -> Hits:
    """A scale is zero, negative, infinite or NaN."""
    for node in c.quantizers:
        scale = scale_of(c.view, node)
        if scale is not None and not _positive(scale.astype(np.float64)):
            yield node.name, f"the scale {node.input[1]!r} holds values that are not finite and greater than 0"


def _positive(scale: NDArray[np.float64]) -> bool:
    return bool(np.all(np.isfinite(scale)) and np.all(scale > 0))


def per_channel_activation(c: Context) -> Hits:
    """An activation of a GEMM or convolution has one scale per channel."""
    for site in c.sites:
        for operand in site.activations:
            if operand.per_axis:
                yield site.node.name, f"the activation in slot {operand.slot} has per-channel scales ({operand.dq.name})"


def wrong_weight_axis(c: Context) -> Hits:
    """A weight's scales run along another axis than the output channels."""
    for site in c.sites:
        rule, weight = c.target.op_rule(site.node.op_type), site.weight
        if rule is None or weight is None or not weight.per_axis or weight.rank is None or weight.axis_here is None:
            continue
        trans_b = any(a.name == "transB" and a.i for a in site.node.attribute)
        wanted = rule.axis(weight.rank, trans_b)
        if weight.axis_here != wanted:
            yield site.node.name, f"the weight's scales run along axis {weight.axis_here}, output channels are axis {wanted}"


def unequal_quantizers(c: Context) -> Hits:
    """Two QuantizeLinear read one tensor with different scales or types."""
    for name, uses in c.view.consumers.items():
        readers = [n for n, slot in uses if n.op_type == "QuantizeLinear" and slot == 0]
        forms = {_form(c, n) for n in readers}
        if len(forms) > 1:
            yield readers[1].name, f"the tensor {name!r} is quantized {len(readers)} times with unequal scales or types"


def _form(c: Context, node: NodeProto) -> tuple[object, ...]:
    scale = scale_of(c.view, node)
    return (None if scale is None else scale.tobytes(), c.code_type(node))


def bad_names(c: Context) -> Hits:
    """A node has no name, or the name of another."""
    seen: set[str] = set()
    for i, node in enumerate(c.view.nodes):
        if not node.name:
            yield "", f"node {i} ({node.op_type}) has no name"
        elif node.name in seen:
            yield node.name, f"another node has the name {node.name!r} too"
        seen.add(node.name)


def opset_too_low(c: Context) -> Hits:
    """The opset is older than the code types need (float16 scales: 19)."""
    have = c.view.opset()
    lacking = ((n, _needed_opset(c, n)) for n in c.quantizers)
    worst = max((x for x in lacking if x[1] > have), key=lambda x: x[1], default=None)
    if worst is not None:
        yield worst[0].name, f"opset {have} is too low: this {worst[0].op_type} needs {worst[1]}"


def opset_too_high(c: Context) -> Hits:
    """The opset is newer than the target documents."""
    if c.view.opset() > c.target.max_opset:
        yield "", f"opset {c.view.opset()} is newer than {c.target.max_opset}, the newest that {c.target.name} documents"


def _needed_opset(c: Context, node: NodeProto) -> int:
    kind, scale = c.code_type(node), c.view.constant_proto(node.input[1])
    by_type = {"int4": 21, "uint4": 21, "int16": 21, "uint16": 21, "float4e2m1": 23, "float8e4m3fn": 19, "float8e5m2": 19}
    half = scale is not None and scale.data_type == TensorProto.FLOAT16
    return max(by_type.get(kind or "", 10), 19 if half else 10)


def int32_bias(c: Context) -> Hits:
    """A bias is stored as int32 codes."""
    for node in c.view.of_type(*DEQUANTIZE_OPS):
        if c.view.low_type(node) == "int32":
            yield node.name, "DequantizeLinear of int32 (a quantized bias) is refused by the parser"
