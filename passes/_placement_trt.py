"""Where TensorRT wants Q/DQ: all inputs of weighted layers, attention on all four tensors or on none."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.model import Model
from qcompile.ir.ops import activation_channel_axis, const_value, is_compute, is_op, weight_slot
from qcompile.passes._attention_core import AttentionCore, attention_cores
from qcompile.passes._placement import Placement, activation_spec, weight_spec
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import PerBlock

_BLOCKS = (128, 64, 32, 16)


def place(model: Model, ctx: PassContext, attention: str) -> Placement:
    """Sites for TensorRT (fact sheet C2: inputs only, no Q on outputs, biases, norms, scores or residual adds)."""
    out = Placement()
    for node in model.graph:
        slot = weight_slot(node) if is_compute(node) else None
        if slot is not None:
            _weighted(out, node, slot, ctx)
    if ctx.scheme.activation is not None:
        for core in attention_cores(model.graph):
            _attention(out, core, ctx, attention)
    return out


def _weighted(out: Placement, node: ir.Node, slot: int, ctx: PassContext) -> None:
    reason = ctx.excluded(str(node.name)) or _refusal(node, slot)
    if reason:
        out.miss(node, reason)
        return
    spec = weight_spec(node, slot, ctx.scheme)
    if isinstance(spec.granularity, PerBlock):
        size = _block(node, slot, spec.granularity)
        if size is None:
            out.miss(node, "its reduction length is no multiple of 16, so no block size fits")
            return
        spec = spec.with_granularity(PerBlock(spec.granularity.axis, size))
    if ctx.scheme.activation is not None:
        out.add(node, 1 - slot if node.op_type in ("MatMul", "Gemm") else 0, activation_spec(ctx))
    elif ctx.scheme.block_size is not None and not is_op(node, "MatMul", "Gemm"):
        out.miss(node, "weight-only blocks exist for MatMul and Gemm only")
        return
    out.add(node, slot, spec)


def _block(node: ir.Node, slot: int, granularity: PerBlock) -> int | None:
    value = node.inputs[slot]
    assert value is not None and value.shape is not None
    length = int(value.shape[granularity.axis])
    return next((b for b in _BLOCKS if b <= granularity.size and length % b == 0), None)


def _refusal(node: ir.Node, slot: int) -> str | None:
    if is_op(node, "ConvTranspose"):
        return "TensorRT has no low-precision deconvolution kernel"
    weight = const_value(node.inputs[slot])
    if weight is None or weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return "its weight is not floating point"
    if is_op(node, "MatMul") and (len(weight.shape) != 2 or slot != 1):
        return "its constant operand is not a 2-D right-hand weight"
    if is_op(node, "Gemm", "MatMul") and min(int(d) for d in weight.shape) < 16:
        return f"a {'x'.join(str(d) for d in weight.shape)} matrix is too small for a tensor-core kernel"
    if is_op(node, "Gemm") and activation_channel_axis(node) == 0:
        return "its activation is transposed"
    return None


def _attention(out: Placement, core: AttentionCore, ctx: PassContext, attention: str) -> None:
    """Queries, keys, softmax output and values together, or none: a partial choice breaks the fused kernel."""
    assert ctx.scheme.activation is not None
    reason = next((r for n in (core.scores, core.values) if (r := ctx.excluded(str(n.name)))), None)
    if attention == "none":
        reason = "attention left in float on request"
    if reason:
        for node in (core.scores, core.values):
            out.miss(node, reason)
        return
    spec = activation_spec(ctx)
    out.add(core.scores, 0, spec)
    out.add(core.scores, 1, spec)
    out.add(core.values, core.probability_slot, spec)
    out.add(core.values, 1 - core.probability_slot, spec)
