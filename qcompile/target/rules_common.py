"""Rules about Q/DQ nodes that hold for every target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from qcompile.target.findings import Context, Hits, Site, scale_of
from qcompile.target.platform import OpRule
from qcompile.target.view import DEQUANTIZE_OPS, DYNAMIC_QUANTIZE_OPS


def scale_not_constant(c: Context) -> Hits:
    """A scale is computed in the graph."""
    for node in c.quantizers:
        if not c.view.is_constant(node.input[1]) and not _dynamic_block_scale(c, node):
            yield node.name, f"the scale {node.input[1]!r} is computed at run time"


def _dynamic_block_scale(c: Context, node: NodeProto) -> bool:
    """Whether the scale is the second output of a trt dynamic quantizer (itself dequantized)."""
    inner = c.view.producer.get(node.input[1])
    source = c.view.producer.get(inner.input[0]) if inner is not None and inner.op_type in DEQUANTIZE_OPS else None
    return source is not None and source.op_type in DYNAMIC_QUANTIZE_OPS


def scale_not_positive(c: Context) -> Hits:
    """A scale is zero or negative."""
    for node, scale in _scales(c):
        if np.any(scale <= 0):
            yield node.name, f"the scale {node.input[1]!r} holds values that are not greater than 0"


def scale_not_finite(c: Context) -> Hits:
    """A scale is infinite or NaN: it builds, and every value behind it is NaN or 0."""
    for node, scale in _scales(c):
        if not np.all(np.isfinite(scale)):
            yield node.name, f"the scale {node.input[1]!r} holds infinite values or NaN"


def _scales(c: Context) -> Iterator[tuple[NodeProto, NDArray[np.float64]]]:
    scales = ((n, scale_of(c.view, n)) for n in c.quantizers)
    return ((n, s.astype(np.float64)) for n, s in scales if s is not None)


def per_channel_activation(c: Context) -> Hits:
    """An activation of a GEMM or convolution has one scale per channel."""
    for site in c.sites:
        for operand in site.activations:
            if operand.per_axis:
                yield site.node.name, f"the activation in slot {operand.slot} has per-channel scales ({operand.dq.name})"


def wrong_weight_axis(c: Context) -> Hits:
    """A weight's scales run along another axis than the output channels."""
    for site in c.sites:
        if (axes := misplaced_scales(c, site)) is not None:
            yield site.node.name, "the weight's scales run along axis {}, output channels are axis {}".format(*axes)


def misplaced_scales(c: Context, site: Site) -> tuple[int, int] | None:
    """The axis that a weight's scales run along and the one of the output channels, where these differ."""
    rule, weight = c.target.op_rule(site.node.op_type), site.weight
    if rule is None or weight is None or not weight.per_axis or weight.rank is None or weight.axis_here is None:
        return None
    wanted = output_axis(site, weight.slot, weight.rank, rule)
    return None if weight.axis_here == wanted else (weight.axis_here, wanted)


def output_axis(site: Site, slot: int, rank: int, rule: OpRule) -> int:
    """The axis of the weight in `slot` that becomes output channels (W @ x: the rows of W)."""
    if slot == 1:
        return rule.axis(rank, site.transposed(1))
    return rank - (1 if site.transposed(0) else 2)


def unequal_quantizers(c: Context) -> Hits:
    """Two QuantizeLinear read one tensor with different scales or types."""
    for name, uses in c.view.consumers.items():
        readers = [n for n, slot in uses if n.op_type == "QuantizeLinear" and slot == 0]
        forms = {_form(c, n) for n in readers}
        if len(forms) > 1:
            yield readers[1].name, f"the tensor {name!r} is quantized {len(readers)} times with unequal scales or types"


def duplicate_quantizers(c: Context) -> Hits:
    """Several QuantizeLinear do the same to one tensor."""
    for name, uses in c.view.consumers.items():
        readers = [n for n, slot in uses if n.op_type == "QuantizeLinear" and slot == 0]
        seen: set[tuple[object, ...]] = set()
        for node in readers:
            form = _form(c, node)
            if form in seen and c.view.is_constant(node.input[1]):
                yield node.name, f"the tensor {name!r} is quantized more than once with the same scale"
            seen.add(form)


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
    lacking = ((n, needed_opset(c, n)) for n in c.quantizers)
    worst = max((x for x in lacking if x[1] > have), key=lambda x: x[1], default=None)
    if worst is not None:
        yield worst[0].name, f"opset {have} is too low: this {worst[0].op_type} needs {worst[1]}"


def opset_too_high(c: Context) -> Hits:
    """The opset is newer than the target documents."""
    if c.view.opset() > c.target.max_opset:
        yield "", f"opset {c.view.opset()} is newer than {c.target.max_opset}, the newest that {c.target.name} documents"


def needed_opset(c: Context, node: NodeProto) -> int:
    """The lowest opset in which this Q or DQ node is valid ONNX."""
    kind, scale = c.code_type(node), c.view.constant_proto(node.input[1])
    by_type = {"int4": 21, "uint4": 21, "int16": 21, "uint16": 21, "float4e2m1": 23, "float8e4m3fn": 19, "float8e5m2": 19}
    half = scale is not None and scale.data_type == TensorProto.FLOAT16
    return max(by_type.get(kind or "", 10), 19 if half else 10)


def int32_bias(c: Context) -> Hits:
    """A bias is stored as int32 codes."""
    for node in c.view.of_type(*DEQUANTIZE_OPS):
        if c.view.low_type(node) == "int32":
            yield node.name, "DequantizeLinear of int32 (a quantized bias) is refused by the parser"
