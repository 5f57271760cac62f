"""Where TensorRT wants Q/DQ: all inputs of weighted layers, attention on all four tensors or on none."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.match_scores import Scores, find_scores, find_values
from qcompile.ir.model import Model
from qcompile.ir.ops import activation_channel_axis, const_value, is_compute, is_op, weight_slot
from qcompile.passes._placement import Placement, activation_spec, weight_spec
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import PerBlock

_BLOCKS = (128, 64, 32, 16)


def place(model: Model, ctx: PassContext, attention: str) -> Placement:
    """Sites for TensorRT (inputs only: no Q on outputs, biases, norms, scores or residual adds)."""
    out = Placement()
    for node in model.graph:
        slot = weight_slot(node) if is_compute(node) else None
        if slot is not None:
            _weighted(out, node, slot, ctx)
    if ctx.scheme.activation is not None:
        for softmax in model.graph:
            if is_op(softmax, "Softmax"):
                _attention(out, softmax, ctx, attention)
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


def _attention(out: Placement, softmax: ir.Node, ctx: PassContext, attention: str) -> None:
    """Queries, keys, softmax output and values together, or none: a partial choice breaks the fused kernel."""
    scores, values = find_scores(softmax), find_values(softmax)
    if not isinstance(scores, Scores) or values is None:
        return
    products = (scores.matmul, values.matmul)
    reason = next((r for n in products if (r := ctx.excluded(str(n.name)))), None)
    if attention == "none":
        reason = "attention left in float on request"
    if reason:
        for node in products:
            out.miss(node, reason)
        return
    source = _projected(values.matmul.inputs[values.slot])
    out.add(values.matmul, values.slot, activation_spec(ctx), source, carried=source is not None)
    for node in products:
        out.add(node, 0, activation_spec(ctx))
        out.add(node, 1, activation_spec(ctx))


def _projected(value: ir.Value | None) -> ir.Value | None:
    """The tokens [batch, tokens, channels] that V was before Reshape and Transpose: the same values, one channel a column."""
    while value is not None and is_op(value.producer(), "Reshape", "Transpose"):
        node = value.producer()
        assert node is not None
        value = node.inputs[0]
    return value if value is not None and value.shape is not None and len(value.shape) == 3 else None
