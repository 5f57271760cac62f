"""Rules of TensorRT's explicit quantization (each is a row of the measured behaviour matrix, fact sheet C2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from qcompile.target.findings import Context, Hits, Site, scale_of
from qcompile.target.view import DEQUANTIZE_OPS, MOVEMENT_OPS, QUANTIZE_OPS, attribute

SUPPORTED_CODES = frozenset({"int8", "float8e4m3fn", "int4", "float4e2m1"})
INTEGER_OPS = frozenset(
    [
        "MatMulInteger",
        "ConvInteger",
        "QLinearConv",
        "QLinearMatMul",
        "DynamicQuantizeLinear",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "BitwiseNot",
        "DeformConv",
        "Unique",
    ]
)
COMPUTE_CODES = frozenset({"int8", "float8e4m3fn"})
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "trt"})
SCORE_PATH = frozenset(["Mul", "Div", "Add", "Sub", "Where", "Cast", "Reshape", "Identity"])


def zero_point_not_zero(c: Context) -> Hits:
    """Only symmetric quantization exists."""
    for node in c.quantizers:
        codes = c.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if codes is not None and np.any(codes.astype(np.float32) != 0):
            yield node.name, f"the zero point {node.input[2]!r} is not 0"


def unsupported_codes(c: Context) -> Hits:
    """A code type that the parser refuses (uint8, uint4, int16, float8e5m2) or whose meaning is not established (uint8)."""
    for node in c.quantizers:
        kind = c.code_type(node)
        if kind is not None and kind not in SUPPORTED_CODES and kind != "int32":
            yield node.name, f"{node.op_type} with {kind} codes is not supported"


def scale_type(c: Context) -> Hits:
    """A float32 scale in a float16 network: everything after the DequantizeLinear becomes float32."""
    types = {n.name: _scale_type(c, n) for n in c.quantizers}
    if TensorProto.FLOAT16 not in types.values() and not _half_network(c):
        return
    for node in c.quantizers:
        if types[node.name] == TensorProto.FLOAT:
            yield node.name, "a float32 scale in a float16 network: what follows is computed in float32"


def _scale_type(c: Context, node: NodeProto) -> int:
    proto = c.view.constant_proto(node.input[1])
    return 0 if proto is None else proto.data_type


def _half_network(c: Context) -> bool:
    """Whether the float constants, scales aside, are mostly float16."""
    scales = {n.input[1] for n in c.quantizers}
    tensors = Counter(t.data_type for t in c.view.model.graph.initializer if t.name not in scales)
    return tensors[TensorProto.FLOAT16] > tensors[TensorProto.FLOAT]


def float32_rest(c: Context) -> Hits:
    """All scales are float32: the layers between the quantized ones run in float32."""
    if c.quantizers and not _half_network(c) and all(_scale_type(c, n) == TensorProto.FLOAT for n in c.quantizers):
        yield "", "the scales are float32, so the rest of the network runs in float32 (often slower than plain float16)"


def one_operand_only(c: Context) -> Hits:
    """The activation is quantized but the other operand is not: a float kernel, and Q/DQ to pay for."""
    attention = {n.name for block in _attention(c) for n in block[1:]}
    for site in c.sites:
        if len(site.operands) == 1 and site.activations and site.node.name not in attention:
            yield site.node.name, f"only the operand in slot {site.operands[0].slot} is quantized, so the kernel stays float"


def operand_types_differ(c: Context) -> Hits:
    """int8 against fp8 is an internal builder error; int8 against int4 weights has no kernel."""
    for site in c.sites:
        kinds = {o.type_name for o in site.operands}
        if len(site.operands) == 2 and len(kinds) == 2 and kinds <= SUPPORTED_CODES and not _unpacked_int4(site):
            yield site.node.name, f"the operands are {' and '.join(sorted(str(k) for k in kinds))}; they must be of one type"


def _unpacked_int4(site: Site) -> bool:
    """int8 activations with int4 per-channel or blocked weights: the builder unpacks the weight and runs an int8 GEMM."""
    weight = site.weight
    finer = weight is not None and (weight.per_axis or bool(attribute(weight.dq, "block_size", 0)))
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
        block = int(attribute(weight.dq, "block_size", 0))
        if weight.type_name == "int4" and not block:
            yield site.node.name, "the int4 weight has no blocks, so it is dequantized outside the GEMM"
        if weight.type_name == "int8" and block:
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
        dq = _behind(c, softmax.input[0], DEQUANTIZE_OPS)
        if dq is not None and _scores_matmul(c, dq.input[0]) is not None:
            yield softmax.name, f"the attention scores are quantized ({dq.name}), which breaks the fused attention kernel"


def partial_attention(c: Context) -> Hits:
    """Of q, k, softmax output and v some are quantized and some are not."""
    for softmax, scores, values in _attention(c):
        inputs = {"q": scores.input[0], "k": scores.input[1], "softmax": values.input[0], "v": values.input[1]}
        done = [k for k, name in inputs.items() if _quantized(c, name)]
        if 0 < len(done) < 4:
            yield softmax.name, f"of q, k, softmax and v only {', '.join(done)} are quantized, which breaks the fused kernel"


def _attention(c: Context) -> Iterator[tuple[NodeProto, NodeProto, NodeProto]]:
    """(softmax, scores MatMul, values MatMul) of each attention block."""
    for softmax in c.view.of_type("Softmax"):
        scores, values = _scores_matmul(c, softmax.input[0]), _values_matmul(c, softmax.output[0])
        if scores is not None and values is not None:
            yield softmax, scores, values


def _quantized(c: Context, name: str) -> bool:
    return _behind(c, name, DEQUANTIZE_OPS) is not None


def _behind(c: Context, name: str, wanted: frozenset[str]) -> NodeProto | None:
    """The producer of one of the `wanted` types behind `name`, through data movement and scalar arithmetic."""
    for node in _chain(c, name):
        if node.op_type in wanted:
            return node
        if node.op_type not in SCORE_PATH | MOVEMENT_OPS:
            return None
    return None


def _chain(c: Context, name: str) -> Iterator[NodeProto]:
    node = c.view.producer.get(name)
    while node is not None:
        yield node
        nexts = (c.view.producer.get(x) for x in node.input if x and not c.view.is_constant(x))
        node = next((n for n in nexts if n is not None), None)


def _scores_matmul(c: Context, name: str) -> NodeProto | None:
    for node in _chain(c, name):
        if node.op_type == "MatMul":
            return None if any(c.view.is_constant(x) for x in node.input) else node
        if node.op_type not in SCORE_PATH | MOVEMENT_OPS | QUANTIZE_OPS | DEQUANTIZE_OPS:
            return None
    return None


def _values_matmul(c: Context, name: str) -> NodeProto | None:
    for node, slot in c.view.consumers.get(name, []):
        if node.op_type == "MatMul" and slot == 0:
            return node
        if node.op_type in MOVEMENT_OPS | QUANTIZE_OPS | DEQUANTIZE_OPS and slot == 0:
            return _values_matmul(c, node.output[0])
    return None


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
        if tensor.data_type not in (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN):
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


def gpu_types(c: Context) -> Hits:
    """A code type without kernels on one of the GPUs, or a GPU that the backend cannot compile for."""
    kinds = Counter(k for n in c.quantizers if (k := c.code_type(n)) is not None)
    for gpu in c.gpus:
        if c.target.gpus and gpu not in c.target.gpus:
            yield "", f"{c.target.name} cannot compile for {gpu} (it has {', '.join(c.target.gpus)})"
            continue
        number = int(gpu.removeprefix("sm")) if gpu.removeprefix("sm").isdigit() else 0
        for kind in kinds:
            if number and number < c.target.capability(kind):
                yield "", f"{kind} needs sm{c.target.capability(kind)} or newer, {gpu} has no such kernels"
