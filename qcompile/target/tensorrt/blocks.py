"""Which layers NVFP4 and MXFP8 blocks fit, and FP8 for the others."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.ops import is_op, output_channel_axis
from qcompile.quant.blockformats import block_format
from qcompile.quant.spec import PerAxis, PerBlock, QuantSpec
from qcompile.target.specs import activation_spec
from qcompile.target.target import Request

_SHORTEST = 32  # measured: FP4 over 16 values becomes a float GEMM where few rows are multiplied


def scaled_blocks(out: Placement, node: ir.Node, slot: int, request: Request) -> None:
    """Blocks along the reduction axis on both operands, or the scheme's fallback type on both, with a remark."""
    scheme, channel = request.scheme, output_channel_axis(node)
    assert scheme.weight is not None and scheme.activation is not None
    assert scheme.block_size is not None and scheme.fallback is not None
    data = 1 - slot if is_op(node, "MatMul", "Gemm") else 0
    reason = _misfit(node, data, slot, scheme.block_size)
    if reason is not None:
        out.note(node, f"{scheme.fallback.name} instead of {scheme.name}: {reason}")
        out.add(node, data, activation_spec(request))
        out.add(node, slot, QuantSpec(scheme.fallback, PerAxis(channel)))
        return
    value = node.inputs[data]
    assert value is not None and value.shape is not None
    out.add(node, data, QuantSpec(scheme.activation, PerBlock(len(value.shape) - 1, scheme.block_size)))
    out.add(node, slot, QuantSpec(scheme.weight, PerBlock(1 - channel, scheme.block_size)))


def _misfit(node: ir.Node, data: int, slot: int, size: int) -> str | None:
    if not is_op(node, "MatMul", "Gemm"):
        return "TensorRT has blocks for matrix products only"
    value, weight = node.inputs[data], node.inputs[slot]
    assert value is not None and weight is not None and weight.shape is not None
    length = weight.shape[1 - output_channel_axis(node)]
    if not isinstance(length, int) or length % size:
        return f"its reduction length {length} is no multiple of {size}"
    if length < _SHORTEST:
        return f"its reduction length {length} is too short for a kernel with blocks"
    if value.shape is None or len(value.shape) not in (2, 3):
        rank = "of unknown rank" if value.shape is None else f"{len(value.shape)}-D"
        return f"TensorRT quantizes 2-D and 3-D activations to blocks, this one is {rank}"
    if value.shape[-1] != length:
        return "the length of its activation's last axis is not known before run time"
    return None


def in_blocks(out: Placement, nodes: Sequence[ir.Node]) -> bool:
    """Whether an input of `nodes` is quantized in blocks already."""
    return any(block_format(spec) is not None for n in nodes for v in n.inputs for spec in out.specs(v))
