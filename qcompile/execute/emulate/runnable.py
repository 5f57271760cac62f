"""`runnable`: the same function in operators that ONNX Runtime has kernels for."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.execute.emulate.bf16 import emulate_bf16
from qcompile.execute.emulate.fp4 import emulate_fp4
from qcompile.execute.emulate.fp8_clip import keep_clips
from qcompile.execute.emulate.mxfp8 import emulate_mxfp8
from qcompile.ir.edit import erase_dead
from qcompile.ir.model import Model

REWRITES: tuple[Callable[[ir.Graph], bool], ...] = (emulate_fp4, emulate_mxfp8, keep_clips, emulate_bf16)
_NARROW = frozenset({
    ir.DataType.BFLOAT16, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E8M0,
})  # fmt: skip
_TYPES = ("to", "dtype", "output_dtype")
_TENSORRT = "TRT_"


def runnable(model: Model) -> Model:
    """`model` itself if ONNX Runtime can run it, else a copy with its FP4, MXFP8 and bfloat16 parts in standard operators.

    The copy computes the same values bit for bit (only a negative zero may lose its sign; bfloat16 sums inside an operator
    are float32); tensors that were there keep their names.  It shows what a format does to accuracy; its speed says
    nothing about an engine's.
    """
    if not any(_holds_narrow(graph) for graph in (model.graph, *model.graph.subgraphs())):
        return model
    copy = model.clone()
    changed = [rewrite(copy.graph) for rewrite in REWRITES]
    if not any(changed):
        return model
    erase_dead(copy)
    return copy


def _holds_narrow(graph: ir.Graph) -> bool:
    """Whether `graph` names a type or an operator that a rewrite looks for."""
    values = (*graph.inputs, *graph.initializers.values())
    return any(v.dtype in _NARROW for v in values) or any(_makes_narrow(node) for node in graph)


def _makes_narrow(node: ir.Node) -> bool:
    if node.op_type.startswith(_TENSORRT) or any(v.dtype in _NARROW for v in node.outputs):
        return True
    named = [node.attributes[name] for name in _TYPES if name in node.attributes]
    if any(a.type == ir.AttributeType.INT and a.as_int() in _NARROW for a in named):
        return True
    stored = node.attributes.get("value")
    return stored is not None and stored.type == ir.AttributeType.TENSOR and stored.as_tensor().dtype in _NARROW
