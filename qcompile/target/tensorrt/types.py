"""Strong typing: operands that must have one type do (ONNX's own type variables, applied to float types)."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from qcompile.target.findings import Context, Hits
from qcompile.target.view import DEQUANTIZE_OPS, QUANTIZE_OPS, GraphView

FLOATS: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
TYPED_SCALES = 19  # from this opset on a DequantizeLinear's output has its scale's type


def mixed_types(c: Context) -> Hits:
    """float32 and float16 meet in one operator; the parser casts nothing."""
    if c.view.opset() < TYPED_SCALES and any(c.view.elem_types.get(n.input[1]) != TensorProto.FLOAT for n in c.quantizers):
        return
    for node in c.view.nodes:
        kinds = sorted(_clash(c.view, node))
        if kinds:
            yield node.name, f"{' and '.join(kinds)} meet in one {node.op_type}: the parser refuses it"


def _clash(view: GraphView, node: NodeProto) -> set[str]:
    for names in _groups(view, node):
        kinds = {FLOATS[t] for n in names if (t := view.elem_types.get(n, 0)) in FLOATS}
        if len(kinds) > 1:
            return kinds
    return set()


def _groups(view: GraphView, node: NodeProto) -> Iterator[list[str]]:
    """Inputs that share one type variable of the operator's schema."""
    if node.domain not in ("", "ai.onnx") or node.op_type in QUANTIZE_OPS | DEQUANTIZE_OPS or not onnx.defs.has(node.op_type):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=view.opset())
    except onnx.defs.SchemaError:
        return
    groups: dict[str, list[str]] = {}
    for slot, name in enumerate(node.input):
        formal = schema.inputs[min(slot, len(schema.inputs) - 1)]
        if name:
            groups.setdefault(formal.type_str, []).append(name)
    yield from groups.values()
