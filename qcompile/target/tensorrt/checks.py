"""Rules of TensorRT's explicit quantization (rows of the matrix that `tests/target/test_agreement.py` builds)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from qcompile.ir.optable import ops_with
from qcompile.target.attention import AttentionBlock, attention_blocks, scores_of
from qcompile.target.findings import Context, Hits, Operand, Site, scale_of
from qcompile.target.rules_common import misplaced_scales
from qcompile.target.tensorrt.fusion import dequantized
from qcompile.target.view import DEQUANTIZE_OPS, QUANTIZE_OPS, attribute

FLOAT_CODES = frozenset({"float8e4m3fn", "float4e2m1", "float8e5m2"})
SUPPORTED_CODES = frozenset({"int8", "float8e4m3fn", "int4", "float4e2m1"})
INTEGER_OPS = ops_with("integer-product") | ops_with("bits") | {"DynamicQuantizeLinear", "DeformConv", "Unique"}
COMPUTE_CODES = frozenset({"int8", "float8e4m3fn", "float4e2m1"})
HALF_TYPES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "trt"})


def zero_point_not_zero(c: Context) -> Hits:
    """Only symmetric quantization exists."""
    for node in _moved(c):
        if c.code_type(node) not in FLOAT_CODES:
            yield node.name, f"the zero point {node.input[2]!r} is not 0"


def float_zero_point(c: Context) -> Hits:
    """fp8 and fp4 have no zero point; the builder takes one that is not 0 without a word."""
    for node in _moved(c):
        if c.code_type(node) in FLOAT_CODES:
            yield node.name, f"the zero point {node.input[2]!r} of {c.code_type(node)} codes is not 0"


def _moved(c: Context) -> Iterator[NodeProto]:
    for node in c.quantizers:
        zero = c.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None and np.any(zero.astype(np.float32) != 0):
            yield node


def unsupported_codes(c: Context) -> Hits:
    """A code type that the parser refuses: uint8 weights, uint4, int16, uint16, float8e5m2."""
    for node in c.quantizers:
        kind = c.code_type(node)
        if kind is not None and kind not in SUPPORTED_CODES and kind != "int32" and not _uint8_activation(c, node):
            yield node.name, f"{node.op_type} with {kind} codes is not supported"


def uint8_activation(c: Context) -> Hits:
    """uint8 activations build (zero point 0), but what becomes of codes above 127 is not established."""
    for node in c.quantizers:
        if _uint8_activation(c, node):
            yield node.name, "uint8 activation codes: the engine reads them as int8, so codes above 127 have no known meaning"


def _uint8_activation(c: Context, node: NodeProto) -> bool:
    """Whether the codes are uint8 by zero point or by default; named by `output_dtype` they are refused."""
    pair = [node, c.view.producer.get(node.input[0])]
    named = any(n is not None and attribute(n, "output_dtype", 0) == TensorProto.UINT8 for n in pair)
    return c.code_type(node) == "uint8" and not c.view.is_constant(node.input[0]) and not named


def scale_type(c: Context) -> Hits:
    """A float32 scale in a float16 network: everything after the DequantizeLinear becomes float32."""
    types = {n.name: _scale_type(c, n) for n in c.quantizers}
    if not HALF_TYPES & set(types.values()) and not half_network(c):
        return
    for node in c.quantizers:
        if types[node.name] == TensorProto.FLOAT and not _two_level(c, node):
            yield node.name, "a float32 scale in a float16 network: what follows is computed in float32"


def _scale_type(c: Context, node: NodeProto) -> int:
    proto = c.view.constant_proto(node.input[1])
    return 0 if proto is None else proto.data_type


def _two_level(c: Context, node: NodeProto) -> bool:
    """Whether the node makes or reads block scales, or reads fp4 codes: its outer scale is float32 by definition."""
    users = c.view.consumers.get(node.output[0], [])
    return c.code_type(node) == "float4e2m1" or any(n.op_type in DEQUANTIZE_OPS and slot == 1 for n, slot in users)


def half_network(c: Context) -> bool:
    """Whether the inputs and float constants, scales aside, are mostly float16 or bfloat16."""
    scales = {n.input[1] for n in c.quantizers}
    graph = c.view.model.graph
    tensors = Counter(t.data_type for t in graph.initializer if t.name not in scales)
    tensors.update(v.type.tensor_type.elem_type for v in graph.input)
    return sum(tensors[t] for t in HALF_TYPES) > tensors[TensorProto.FLOAT]


def float32_rest(c: Context) -> Hits:
    """All scales are float32: the layers between the quantized ones run in float32."""
    if c.quantizers and not half_network(c) and all(_scale_type(c, n) == TensorProto.FLOAT for n in c.quantizers):
        yield "", "the scales are float32, so the rest of the network runs in float32 (often slower than plain float16)"


def one_operand_only(c: Context) -> Hits:
    """The activation is quantized but the other operand is not: a float kernel, and Q/DQ to pay for."""
    attention = {n.name for block in attention_blocks(c.view) for n in block.products}
    for site in c.sites:
        if len(site.operands) == 1 and site.activations and site.node.name not in attention:
            yield site.node.name, f"only the operand in slot {site.operands[0].slot} is quantized, so the kernel stays float"


def operand_types_differ(c: Context) -> Hits:
    """The two operands have unequal code types (int8 by per-channel int4 in a GEMM is the exception)."""
    for site in c.sites:
        kinds = {o.type_name for o in site.operands}
        if len(site.operands) < 2 or not kinds <= SUPPORTED_CODES or not _fused(c, site):
            continue
        if kinds == {"int4"} and site.node.op_type in ("Conv", "ConvTranspose"):
            yield site.node.name, "no convolution reads int4 on both sides"
        if len(kinds) == 2 and not _unpacked_int4(site) and not _float_deconvolution(site, kinds):
            yield site.node.name, f"the operands are {' and '.join(sorted(str(k) for k in kinds))}; they must be of one type"


def _fused(c: Context, site: Site) -> bool:
    """Whether the builder tries one kernel for both operands: their scales must fit it, else each is dequantized apart."""
    bad_scale = any(
        (o.per_axis and not _along_rows(site, o)) or (o.one_scale and site.node.op_type == "Conv") for o in site.activations
    )
    return not bad_scale and misplaced_scales(c, site) is None


def _float_deconvolution(site: Site, kinds: set[str | None]) -> bool:
    """ConvTranspose is float anyway: int8 with anything builds, fp8 with int4 does not."""
    return site.node.op_type == "ConvTranspose" and "int8" in kinds


def _unpacked_int4(site: Site) -> bool:
    """int8 with int4, the weight per channel: the builder unpacks the int4 side and runs an int8 GEMM."""
    weight = site.weight
    finer = weight is not None and (weight.per_axis or bool(weight.block))
    return site.node.op_type in ("MatMul", "Gemm") and finer and {o.type_name for o in site.operands} == {"int8", "int4"}


def weight_only_int8(c: Context) -> Hits:
    """An int8 or fp8 weight against a float activation is dequantized outside the kernel."""
    for site in c.sites:
        weight = site.weight
        if weight is not None and len(site.operands) == 1 and weight.type_name in COMPUTE_CODES:
            yield site.node.name, f"the {weight.type_name} weight meets a float activation: smaller file, float kernel"


def unblocked_int4(c: Context) -> Hits:
    """INT4 per tensor or per channel is dequantized outside the GEMM; INT8 blocks are too."""
    for site in c.sites:
        weight = site.weight
        if weight is None or site.activations:
            continue
        if weight.type_name == "int4" and not weight.block:
            yield site.node.name, "the int4 weight has no blocks, so it is dequantized outside the GEMM"
        if weight.type_name == "int8" and weight.block:
            yield site.node.name, "blocked int8 weights are dequantized to float outside the GEMM"


def unsupported_op(c: Context) -> Hits:
    """Integer arithmetic and a few others have no importer."""
    for node in c.view.nodes:
        if node.op_type in INTEGER_OPS and node.domain in ("", "ai.onnx"):
            yield node.name, f"{node.op_type} is not supported by the parser"


def contrib_domain(c: Context) -> Hits:
    """Operators of other domains need a plugin."""
    local = {(f.domain, f.name) for f in c.view.model.functions}
    for node in c.view.nodes:
        if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in local:
            yield node.name, f"{node.domain}::{node.op_type} is not an ONNX or trt operator"


def quantized_scores(c: Context) -> Hits:
    """Q/DQ between the scores and the softmax breaks the fused attention kernel."""
    for softmax in c.view.of_type("Softmax"):
        dq = scores_dequantizer(c, softmax)
        if dq is not None:
            yield softmax.name, f"the attention scores are quantized ({dq.name}), which breaks the fused attention kernel"


def scores_dequantizer(c: Context, softmax: NodeProto) -> NodeProto | None:
    """The last DequantizeLinear between the scores and the softmax."""
    scores = scores_of(c.view, softmax)
    return None if scores is None else next((n for n in reversed(scores.between) if n.op_type in DEQUANTIZE_OPS), None)


def partial_attention(c: Context) -> Hits:
    """Of q, k, softmax output and v some are quantized and some are not."""
    for block in attention_blocks(c.view):
        done = quantized_operands(c, block)
        if 0 < len(done) < 4:
            softmax = block.softmax.name
            yield softmax, f"of q, k, softmax and v only {', '.join(done)} are quantized, which breaks the fused kernel"


def quantized_operands(c: Context, block: AttentionBlock) -> list[str]:
    """Which of q, k, softmax and v are quantized."""
    return [name for name, (node, slot) in block.operands.items() if dequantized(c.view, node.input[slot])]


def packed_qkv(c: Context) -> Hits:
    """A packed qkv projection with per-channel scales compiles to a float kernel (measured: 22 % of a GPT's work)."""
    for site in c.sites:
        weight = site.weight
        if site.node.op_type != "MatMul" or weight is None or weight.type_name not in COMPUTE_CODES:
            continue
        if weight.per_axis and _feeds_qkv(c, site):
            yield site.node.name, "a packed q/k/v projection with per-channel weight scales compiles to a float kernel"


def _feeds_qkv(c: Context, site: Site) -> bool:
    """Whether the output is cut into at least three parts, all of which are operands of attention."""
    parts = _cuts(c, site.node.output[0], 6)
    return len(parts) >= 3


def _cuts(c: Context, name: str, steps: int) -> list[str]:
    """Names of the parts that Split, Slice or Gather make of `name`."""
    found: list[str] = []
    for node, slot in c.view.consumers.get(name, []) if steps else []:
        if node.op_type == "Split":
            found += list(node.output)
        elif node.op_type in ("Slice", "Gather") and slot == 0:
            found.append(node.output[0])
        elif node.op_type in ("Add", "Reshape", "Transpose", *QUANTIZE_OPS, *DEQUANTIZE_OPS):
            found += _cuts(c, node.output[0], steps - 1)
    return found


def deconvolution(c: Context) -> Hits:
    """ConvTranspose runs in float whatever its Q/DQ says."""
    for site in c.sites:
        rule = c.target.op_rule(site.node.op_type)
        if rule is not None and not rule.low_kernel:
            yield site.node.name, f"{site.node.op_type} compiles to a float kernel although it is quantized"


def constant_codes(c: Context) -> Hits:
    """Codes stored as a constant must go straight into a DequantizeLinear."""
    for tensor in c.view.model.graph.initializer:
        if tensor.data_type not in (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1):
            continue
        for node, slot in c.view.consumers.get(tensor.name, []):
            if node.op_type not in QUANTIZE_OPS | DEQUANTIZE_OPS:
                yield node.name, f"the codes {tensor.name!r} go into slot {slot} of {node.op_type} instead of a DequantizeLinear"


def softmax_scale(c: Context) -> Hits:
    """The int8 range of a softmax output is known: 1/127 (fp8: 1/448); a larger scale wastes codes."""
    limits = {"int8": 1 / 127, "float8e4m3fn": 1 / 448}
    for softmax in c.view.of_type("Softmax"):
        for q, slot in c.view.consumers.get(softmax.output[0], []):
            limit = limits.get(c.code_type(q) or "") if q.op_type in QUANTIZE_OPS and slot == 0 else None
            scale = scale_of(c.view, q) if limit is not None else None
            if limit is not None and scale is not None and float(scale.reshape(-1)[0]) > 1.02 * limit:
                yield q.name, f"the scale of the softmax output is larger than {limit:.5f}, which covers all of 0..1"


def per_channel_activation(c: Context) -> Hits:
    """Several scales on one activation: a convolution, or a GEMM along its reduction axis, runs in float."""
    for site, operand in _finer_activations(c):
        if not _along_rows(site, operand):
            yield site.node.name, f"the activation in slot {operand.slot} has per-channel scales ({operand.dq.name})"


def per_row_activation(c: Context) -> Hits:
    """One scale per row (or column) of a GEMM's activation: RTX runs it, but it is documented for weights only."""
    for site, operand in _finer_activations(c):
        if _along_rows(site, operand):
            yield site.node.name, f"the activation in slot {operand.slot} has a scale per row ({operand.dq.name}), not one in all"


def _finer_activations(c: Context) -> Iterator[tuple[Site, Operand]]:
    return ((site, o) for site in c.sites for o in site.activations if o.per_axis)


def _along_rows(site: Site, operand: Operand) -> bool:
    reduction = site.reduction_axis(operand)
    return None not in (reduction, operand.axis_here) and operand.axis_here != reduction


def int4_activation(c: Context) -> Hits:
    """INT4 is documented for weights only; RTX compiles an int4 GEMM, other TensorRT versions may not."""
    for site in c.sites:
        for operand in site.activations:
            if operand.type_name == "int4":
                yield site.node.name, f"the activation in slot {operand.slot} is int4, which is documented for weights only"
