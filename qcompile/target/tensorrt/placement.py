"""Where TensorRT wants Q/DQ: all inputs of weighted layers, attention on all four tensors or on none.

What the default leaves in float and --quantize may ask for is in `_placement_defaults`; residual adds and Concat in
`_placement_joins`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.notes import kept_float
from qcompile.ir.ops import activation_channel_axis, const_value, is_compute, is_op, static_shape, weight_slot
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import PerBlock
from qcompile.structure.scores import Scores, find_scores, find_values
from qcompile.target.specs import activation_spec, weight_spec
from qcompile.target.tensorrt.blocks import in_blocks, scaled_blocks
from qcompile.target.tensorrt.branches import range_branches
from qcompile.target.tensorrt.defaults import attention_refusal, default_refusal, final_heads, is_native
from qcompile.target.tensorrt.joins import share_concat_ranges, share_residuals

_PROBABILITY = (0.0, 1.0)
_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Choices:
    """The placement options of annotate: see there."""

    attention: str = "auto"
    probabilities: str = "auto"
    residual: str = "float"


def place(model: Model, ctx: PassContext, choices: Choices) -> Placement:
    """Sites for TensorRT (inputs only: no Q on outputs, biases, norms or scores)."""
    out, heads = Placement(), final_heads(model.graph)
    for node in model.graph:
        slot = weight_slot(node) if is_compute(node) else None
        if slot is not None:
            _weighted(out, node, slot, ctx, heads)
    if ctx.scheme.activation is not None:
        for softmax in model.graph:
            if is_op(softmax, "Softmax"):
                _attention(out, softmax, ctx, choices)
        range_branches(out, model.graph, ctx)
        if is_native(ctx):
            share_concat_ranges(out, model.graph)
            share_residuals(out, model.graph, ctx, choices.residual == "shared")
    return out


def _weighted(out: Placement, node: ir.Node, slot: int, ctx: PassContext, heads: frozenset[ir.Node]) -> None:
    reason = ctx.selection.excluded(node) or kept_float(node) or _impossible(node, slot, ctx) or _unasked(node, slot, ctx, heads)
    if reason:
        out.miss(node, reason)
        return
    if ctx.scheme.fallback is not None:
        scaled_blocks(out, node, slot, ctx)
        return
    spec = weight_spec(node, slot, ctx.scheme)
    if isinstance(spec.granularity, PerBlock):
        size = _block(node, slot, spec.granularity)
        if size is None:
            out.miss(node, "its reduction length is no multiple of 16, so no block size fits")
            return
        spec = spec.with_granularity(PerBlock(spec.granularity.axis, size))
    if ctx.scheme.activation is not None:
        out.add(node, 1 - slot if node.op_type in ("MatMul", "Gemm") else 0, activation_spec(ctx.target, ctx.scheme))
    elif ctx.scheme.block_size is not None and not is_op(node, "MatMul", "Gemm"):
        out.miss(node, "weight-only blocks exist for MatMul and Gemm only")
        return
    out.add(node, slot, spec)


def _block(node: ir.Node, slot: int, granularity: PerBlock) -> int | None:
    length = (static_shape(node.inputs[slot]) or ())[granularity.axis]
    assert length is not None
    return next((b for b in _BLOCKS if b <= granularity.size and length % b == 0), None)


def _unasked(node: ir.Node, slot: int, ctx: PassContext, heads: frozenset[ir.Node]) -> str | None:
    if ctx.selection.forced(node) is not None:
        return None
    reason = default_refusal(node, slot, ctx, heads)
    return None if reason is None else f"{reason} (--quantize {node.name} overrides)"


def _impossible(node: ir.Node, slot: int, ctx: PassContext) -> str | None:
    reason, forced = _unfit(node, slot), ctx.selection.forced(node)
    return reason if reason is None or forced is None else f"{reason}, so --quantize {forced} cannot be met"


def _unfit(node: ir.Node, slot: int) -> str | None:
    weight = const_value(node.inputs[slot])
    if weight is None or weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return "its weight is not floating point"
    if is_op(node, "MatMul") and (len(weight.shape) != 2 or slot != 1):
        return "its constant operand is not a 2-D right-hand weight"
    if is_op(node, "Gemm") and activation_channel_axis(node) == 0:
        return "its activation is transposed"
    return None


def _attention(out: Placement, softmax: ir.Node, ctx: PassContext, choices: Choices) -> None:
    """Queries, keys, softmax output and values together, or none: a partial choice breaks the fused kernel."""
    scores, values = find_scores(softmax), find_values(softmax)
    if not isinstance(scores, Scores) or values is None:
        return
    products = (scores.matmul, values.matmul)
    reason = next((r for n in products if (r := ctx.selection.excluded(n))), None)
    if not reason and in_blocks(out, products):
        reason = f"an input of it is in {ctx.scheme.name} blocks, and a tensor has one quantizer"
    if not reason and not any(ctx.selection.forced(n) for n in products):
        reason = _left_alone(scores, ctx, choices.attention)
    if reason:
        for node in products:
            out.miss(node, reason)
        return
    if ctx.scheme.fallback is not None:
        for node in products:
            out.note(node, f"{ctx.scheme.fallback.name} instead of {ctx.scheme.name}: attention multiplies 4-D activations")
    source = _projected(values.matmul.inputs[values.slot])
    out.add(values.matmul, values.slot, activation_spec(ctx.target, ctx.scheme), source, carried=source is not None)
    if not values.changed and _fixed(ctx, choices.probabilities):
        out.known(values.matmul, 1 - values.slot, activation_spec(ctx.target, ctx.scheme), _PROBABILITY)
    for node in products:
        out.add(node, 0, activation_spec(ctx.target, ctx.scheme))
        out.add(node, 1, activation_spec(ctx.target, ctx.scheme))


def _fixed(ctx: PassContext, probabilities: str) -> bool:
    """Whether the softmax output has the scale of [0, 1] whatever it holds: 1/448 is what fused FP8 kernels expect.

    In int8, 1/127 rounds the probabilities of long rows to 0 or 1 (a ViT of 197 tokens: 14.6 dB at the logits, 30.7 dB with
    a measured range), and the kernel fuses with any scale (audited).
    """
    floats = activation_spec(ctx.target, ctx.scheme).qtype.family == "float"
    return is_native(ctx) and (probabilities == "fixed" or (probabilities == "auto" and floats))


def _left_alone(scores: Scores, ctx: PassContext, attention: str) -> str | None:
    if attention == "none":
        return "attention left in float on request"
    return attention_refusal(scores, ctx) if attention == "auto" else None


def _projected(value: ir.Value | None) -> ir.Value | None:
    """The tokens [batch, tokens, channels] that V was before Reshape and Transpose: the same values, one channel a column."""
    while value is not None and is_op(value.producer(), "Reshape", "Transpose"):
        node = value.producer()
        assert node is not None
        value = node.inputs[0]
    return value if value is not None and value.shape is not None and len(value.shape) == 3 else None
