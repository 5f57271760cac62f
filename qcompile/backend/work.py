"""How much multiply-add work each node of a model does, and which of it is planned at a low precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from onnx import NodeProto

from qcompile.ir.optable import ops_with
from qcompile.target.view import WEIGHTED_OPS, GraphView, attribute

WorkKind = Literal["gemm", "conv", "bmm", "attention", "recurrent"]
RECURRENT_OPS = ops_with("recurrent")
COMPUTE_OPS = WEIGHTED_OPS | RECURRENT_OPS | {"Attention"}
COMPUTE_TYPES = frozenset({"int8", "float8e4m3fn", "float4e2m1"})


@dataclass(frozen=True)
class WorkItem:
    """One GEMM, convolution, attention product or recurrent layer.

    `flops` is 2 x multiply-adds at the optimum shapes, None when a shape is unknown; `low_type` is the type that all
    its compute inputs are dequantized from (planned work); `weight_type` is set when only the weight is (weight-only).
    """

    node: str
    op_type: str
    kind: WorkKind
    flops: int | None
    low_type: str | None
    weight_type: str | None
    constant_weight: bool


def _conv_flops(node: NodeProto, shapes: Mapping[str, list[int]]) -> int:
    weight = shapes[node.input[1]]
    pixels = shapes[node.input[0]] if node.op_type == "ConvTranspose" else shapes[node.output[0]]
    return 2 * prod(pixels) * prod(weight[1:])


def _gemm_flops(node: NodeProto, shapes: Mapping[str, list[int]]) -> int:
    a, out = shapes[node.input[0]], shapes[node.output[0]]
    reduction = a[0] if node.op_type == "Gemm" and attribute(node, "transA", 0) else a[-1]
    return 2 * prod(out) * reduction


def _attention_flops(node: NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """Q K^T and P V of the ONNX Attention op; 4-D [batch, heads, length, size] or 3-D [batch, length, hidden]."""
    q, k, v = (shapes[n] for n in node.input[:3])
    if len(q) == 4:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    heads, kv_heads = int(attribute(node, "q_num_heads", 1)), int(attribute(node, "kv_num_heads", 1))
    return 2 * q[0] * q[1] * k[1] * (q[2] + v[2] // kv_heads * heads)


def _recurrent_flops(node: NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """The products with W and R at each step of a sequence [length, batch, size] or [batch, length, size]."""
    length, batch = shapes[node.input[0]][:2]
    return 2 * length * batch * (prod(shapes[node.input[1]]) + prod(shapes[node.input[2]]))


def _flops(node: NodeProto, shapes: Mapping[str, list[int]]) -> int | None:
    try:
        return _COUNTS.get(node.op_type, _gemm_flops)(node, shapes)
    except (KeyError, IndexError):
        return None


_COUNTS = {
    "Conv": _conv_flops,
    "ConvTranspose": _conv_flops,
    "Attention": _attention_flops,
    **dict.fromkeys(RECURRENT_OPS, _recurrent_flops),
}


def _item(view: GraphView, node: NodeProto, shapes: Mapping[str, list[int]]) -> WorkItem:
    slots = node.input[: 3 if node.op_type == "Attention" else 2]
    types = [view.low_type(dq) if (dq := view.dequantizer(name)) is not None else None for name in slots]
    same = types[0] if types[0] in COMPUTE_TYPES and len(set(types)) == 1 else None
    constant = len(slots) > 1 and view.is_constant(slots[1])
    weight_only = types[1] if constant and types[0] is None else None
    return WorkItem(node.name, node.op_type, _kind(node, constant), _flops(node, shapes), same, weight_only, constant)


def _kind(node: NodeProto, constant_weight: bool) -> WorkKind:
    if node.op_type == "Attention":
        return "attention"
    if node.op_type in RECURRENT_OPS:
        return "recurrent"
    if node.op_type in ("Conv", "ConvTranspose"):
        return "conv"
    return "gemm" if constant_weight else "bmm"


def work_items(view: GraphView, shapes: Mapping[str, list[int]]) -> list[WorkItem]:
    """What multiplies matrices in the top-level graph at run time, in graph order."""
    nodes = view.of_type(*COMPUTE_OPS)
    return [_item(view, n, shapes) for n in nodes if not all(view.is_constant(x) for x in n.input[:2])]
