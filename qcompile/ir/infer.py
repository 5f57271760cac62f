"""Shapes and types of values, by onnx's inference."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.ir.ops import input_at, is_op
from qcompile.ir.schemas import Signature, complete_types, is_tensor, signature


def infer_shapes(model: ir.Model) -> None:
    """Give values the shapes and types that onnx infers, where it can, and types that their readers tell.

    A sequence or an optional value without a type would become a tensor of its elements' type (onnx_ir 1.1): it is none.
    """
    ShapeInferencePass()(model)
    for graph in reversed(list(model.graphs())):
        for node in graph:
            for i, out in enumerate(node.outputs):
                if isinstance(out.type, ir.TensorType) and (kind := _kind(node, i, out.type, model)) is not None:
                    out.type, out.shape = kind, None
        complete_types(graph, model.opset_imports)


def _kind(node: ir.Node, position: int, found: ir.TensorType, model: ir.Model) -> ir.TypeProtocol | None:
    """The type of an output that is no tensor, or None."""
    known = signature(node, model.opset_imports)
    if known is None or known.only(~position, "tensor("):
        return None
    if known.only(~position, "seq("):
        return ir.SequenceType(found)
    if known.only(~position, "optional("):
        inner = input_at(node, 0)
        return ir.OptionalType(found if inner is None or inner.type is None else inner.type)
    tied = next((v for v in _tied(node, position, known) if v is not None and not is_tensor(v)), None)
    return None if tied is None else tied.type


def _tied(node: ir.Node, position: int, known: Signature) -> list[ir.Value | None]:
    """The values that an output is a copy of, or one of the same type."""
    if is_op(node, "If"):
        return [a.as_graph().outputs[position] for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    if is_op(node, "Loop"):
        return [input_at(node, position + 2)]
    return [v for i, v in enumerate(node.inputs) if known.variable(i) == known.variable(~position)]
