"""Where TensorRT wants Q/DQ: all inputs of weighted layers, attention on all four tensors or on none.

What the default leaves in float and --quantize may ask for is in `defaults`; residual adds and Concat in `joins`.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.notes import kept_float
from qcompile.ir.ops import activation_channel_axis, const_value, is_compute, is_data_movement, is_op, static_shape, weight_slot
from qcompile.quant.spec import PerBlock
from qcompile.structure.scores import Scores, Values, find_scores, find_values
from qcompile.target.heads import final_heads
from qcompile.target.specs import activation_spec, weight_spec
from qcompile.target.target import Request
from qcompile.target.tensorrt.blocks import in_blocks, scaled_blocks
from qcompile.target.tensorrt.branches import range_branches
from qcompile.target.tensorrt.defaults import attention_refusal, default_refusal
from qcompile.target.tensorrt.facts import facts_of
from qcompile.target.tensorrt.fusion import BlockFacts, obstacles, only_in_float
from qcompile.target.tensorrt.joins import share_concat_ranges, share_residuals

_PROBABILITY = (0.0, 1.0)
_BLOCKS = (128, 64, 32, 16)


def place(model: Model, request: Request) -> Placement:
    """Sites for TensorRT (inputs only: no Q on outputs, biases, norms or scores)."""
    out, heads = Placement(), final_heads(model.graph)
    for node in model.graph:
        slot = weight_slot(node) if is_compute(node) else None
        if slot is not None:
            _weighted(out, node, slot, request, heads)
    if request.scheme.activation is not None:
        for softmax in model.graph:
            if is_op(softmax, "Softmax"):
                _attention(out, softmax, request)
        range_branches(out, model.graph, request)
        if request.native:
            share_concat_ranges(out, model.graph)
            share_residuals(out, model.graph, request)
    return out


def _weighted(out: Placement, node: ir.Node, slot: int, request: Request, heads: frozenset[ir.Node]) -> None:
    reason = request.selection.excluded(node) or kept_float(node) or _impossible(node, slot, request)
    reason = reason or _unasked(node, slot, request, heads)
    if reason:
        out.miss(node, reason)
        return
    if request.scheme.fallback is not None:
        scaled_blocks(out, node, slot, request)
        return
    spec = weight_spec(node, slot, request.scheme)
    if isinstance(spec.granularity, PerBlock):
        size = _block(node, slot, spec.granularity)
        if size is None:
            out.miss(node, "its reduction length is no multiple of 16, so no block size fits")
            return
        spec = spec.with_granularity(PerBlock(spec.granularity.axis, size))
    if request.scheme.activation is not None:
        out.add(node, 1 - slot if node.op_type in ("MatMul", "Gemm") else 0, activation_spec(request))
    elif request.scheme.block_size is not None and not is_op(node, "MatMul", "Gemm"):
        out.miss(node, "weight-only blocks exist for MatMul and Gemm only")
        return
    out.add(node, slot, spec)


def _block(node: ir.Node, slot: int, granularity: PerBlock) -> int | None:
    length = (static_shape(node.inputs[slot]) or ())[granularity.axis]
    assert length is not None
    return next((b for b in _BLOCKS if b <= granularity.size and length % b == 0), None)


def _unasked(node: ir.Node, slot: int, request: Request, heads: frozenset[ir.Node]) -> str | None:
    if request.selection.forced(node) is not None:
        return None
    reason = default_refusal(node, slot, request, heads)
    return None if reason is None else f"{reason} (--quantize {node.name} overrides)"


def _impossible(node: ir.Node, slot: int, request: Request) -> str | None:
    reason, forced = _unfit(node, slot), request.selection.forced(node)
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


def _attention(out: Placement, softmax: ir.Node, request: Request) -> None:
    """Queries, keys, softmax output and values (in INT8 the output too) together, or none: else the fused kernel breaks."""
    scores, values = find_scores(softmax), find_values(softmax)
    if not isinstance(scores, Scores) or values is None:
        return
    products = (scores.matmul, values.matmul)
    reason = next((r for n in products if (r := request.selection.excluded(n))), None)
    if not reason and in_blocks(out, products):
        reason = f"an input of it is in {request.scheme.name} blocks, and a tensor has one quantizer"
    if not reason and not any(request.selection.forced(n) for n in products):
        reason = _left_alone(scores, request) or _better_in_float(out, scores, values, request)
    if reason:
        for node in products:
            out.miss(node, reason)
        return
    if request.scheme.fallback is not None:
        for node in products:
            out.note(
                node, f"{request.scheme.fallback.name} instead of {request.scheme.name}: attention multiplies 4-D activations"
            )
    source = _projected(values.matmul.inputs[values.slot])
    out.add(values.matmul, values.slot, activation_spec(request), source, carried=source is not None)
    if not values.changed and _fixed(request):
        out.known(values.matmul, 1 - values.slot, activation_spec(request), _PROBABILITY)
    for node in products:
        out.add(node, 0, activation_spec(request))
        out.add(node, 1, activation_spec(request))
    if request.native and activation_spec(request).qtype.family == "int":
        _quantize_output(out, values.matmul, request)
    for obstacle in obstacles(_facts(out, scores, values, request)) if request.native else ():
        out.note(scores.matmul, f"this attention will not be one kernel: {obstacle}")


def _better_in_float(out: Placement, scores: Scores[ir.Node], values: Values[ir.Node], request: Request) -> str | None:
    """Why the block is one kernel in float16 alone, which beats two products and a softmax in kernels of their own."""
    if not request.native or request.choices.attention != "auto":
        return None
    reason = only_in_float(_facts(out, scores, values, request))
    return None if reason is None else f"{reason}; in float16 it is one kernel (annotate{{attention=all}} quantizes it)"


def _quantize_output(out: Placement, pv: ir.Node, request: Request) -> None:
    """An INT8 kernel wants codes for its output too: its own, where no layer behind reads any."""
    value = pv.outputs[0]
    if _quantized_behind(out, value) or value.is_graph_output():
        return
    uses = list(value.uses())
    kept = uses[0][0] if len(uses) == 1 and is_op(uses[0][0], "Where") and uses[0][1] == 1 else pv
    if not kept.outputs[0].is_graph_output():
        out.add(kept, ~0, activation_spec(request))


def _facts(out: Placement, scores: Scores[ir.Node], values: Values[ir.Node], request: Request) -> BlockFacts:
    """What is known of a quantized block before it is built."""
    facts = facts_of(activation_spec(request).qtype.name, scores, values)
    return replace(facts, output=_quantized_behind(out, values.matmul.outputs[0]))


def _quantized_behind(out: Placement, value: ir.Value) -> bool:
    """Whether a layer that reads the tensor, itself, moved, or with 0 in rows that see no key, is quantized so far."""
    moved = (
        n.outputs[0]
        for n, slot in value.uses()
        if (slot == 0 and (is_data_movement(n) or is_op(n, "Cast"))) or (slot == 1 and is_op(n, "Where"))
    )
    return bool(out.specs(value)) or any(_quantized_behind(out, v) for v in moved)


def _fixed(request: Request) -> bool:
    """Whether the softmax output has the scale of [0, 1] whatever it holds: 1/448 is what fused FP8 kernels expect.

    In int8, 1/127 rounds the probabilities of long rows to 0 or 1 (a ViT of 197 tokens: 14.6 dB at the logits, 30.7 dB with
    a measured range), and the kernel fuses with any scale (audited).
    """
    floats, probabilities = activation_spec(request).qtype.family == "float", request.choices.probabilities
    return request.native and (probabilities == "fixed" or (probabilities == "auto" and floats))


def _left_alone(scores: Scores[ir.Node], request: Request) -> str | None:
    attention = request.choices.attention
    if attention == "none":
        return "attention left in float on request"
    return attention_refusal(scores, request) if attention == "auto" else None


def _projected(value: ir.Value | None) -> ir.Value | None:
    """The tokens [batch, tokens, channels] that V was before Reshape and Transpose: the same values, one channel a column."""
    while value is not None and is_op(value.producer(), "Reshape", "Transpose"):
        node = value.producer()
        assert node is not None
        value = node.inputs[0]
    return value if value is not None and value.shape is not None and len(value.shape) == 3 else None
