"""How large a tensor can become, from the weights alone: what cannot overflow needs no measurement."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.ops import const_array, const_scalar, input_at, int_attr, is_data_movement, is_op
from qcompile.ir.optable import ops_with
from qcompile.quant.minifloat import e8m0_values

_KEEPS = ops_with("no-larger")
_QUANTIZERS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear",
})  # fmt: skip
_UNIT = ops_with("bounded")
_ROUNDING = 1.02


def upper_bounds(graph: ir.Graph) -> dict[str, float]:
    """An upper bound on |x| of every node output, by name; infinity where nothing is known.

    |LayerNorm(x)| <= sqrt(C) max|gamma| + max|beta|;  |x W + c| <= max|x| max_o sum_i |W_io| + max|c|;
    behind a norm, Cauchy-Schwarz.
    """
    known: dict[str, float] = {}
    for node in graph:
        bound = _bound(node, lambda v: _of(v, known))
        known.update({str(out.name): bound for out in node.outputs})
    return known


def _of(value: ir.Value | None, known: dict[str, float]) -> float:
    if value is None:
        return 0.0
    array = weight_array(value)
    if array is not None:
        return float(np.abs(array).max(initial=0.0)) if array.dtype.kind in "fiu" else math.inf
    return known.get(str(value.name), math.inf)


def weight_array(value: ir.Value | None) -> NDArray | None:
    """A constant, also one behind a DequantizeLinear (its own scale may be behind one too), as it is computed with."""
    array = const_array(value)
    producer = value.producer() if value is not None else None
    if array is not None or producer is None or not is_quantizer(producer):
        return array
    codes, scale = const_array(producer.inputs[0]), weight_array(input_at(producer, 1))
    if codes is None or scale is None:
        return None
    if producer.op_type == "TRT_MXFP8DequantizeLinear":
        scale = e8m0_values(scale)
    return codes.astype(np.float32) * _spread(scale.astype(np.float32), codes, producer)


def _spread(scale: NDArray, codes: NDArray, node: ir.Node) -> NDArray:
    """The scales shaped to broadcast against the codes."""
    if not scale.ndim:
        return scale
    axis = int_attr(node, "axis", 1) % codes.ndim
    if block := int_attr(node, "block_size", 0):
        return np.repeat(scale, block, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
    return scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])


def is_quantizer(node: ir.Node | None) -> bool:
    """Whether `node` quantizes or dequantizes, as ONNX or as TensorRT names it."""
    return node is not None and node.domain in ("", "trt") and node.op_type in _QUANTIZERS


def _bound(node: ir.Node, of: Callable[[ir.Value | None], float]) -> float:
    if is_quantizer(node):
        weight = weight_array(node.outputs[0])
        return of(node.inputs[0]) * _ROUNDING if weight is None else float(np.abs(weight).max(initial=0.0))
    if node.domain not in ("", "ai.onnx") or not node.inputs:
        return math.inf
    if node.op_type in _UNIT:
        return 1.0
    if node.op_type in _KEEPS or is_data_movement(node):
        inputs = node.inputs if is_op(node, "Concat", "Pad") else node.inputs[:1]
        return max(of(v) for v in inputs) * _ROUNDING
    match node.op_type:
        case "Clip":
            return clip_bound(node, of(node.inputs[0]))
        case "Add" | "Sub" | "Sum":
            return sum(of(v) for v in node.inputs)
        case "Mul":
            return _product(of(node.inputs[0]), of(node.inputs[1]))
        case "Div":
            divisor = const_array(node.inputs[1])
            least = float(np.abs(divisor).min()) if divisor is not None and divisor.size else 0.0
            return of(node.inputs[0]) / least if least > 0 else math.inf
        case "LayerNormalization" | "RMSNormalization":
            gamma = const_array(node.inputs[1])
            shift = of(node.inputs[2]) if len(node.inputs) > 2 else 0.0
            return math.inf if gamma is None else math.sqrt(gamma.size) * of(node.inputs[1]) + shift
        case "MatMul" | "Gemm" | "Conv":
            return _layer(node, of)
        case _:
            return math.inf


def clip_bound(node: ir.Node, bound: float = math.inf) -> float:
    """The largest magnitude behind a Clip of values up to `bound`; limits that are not constant limit nothing."""
    low, high = (const_scalar(input_at(node, slot)) for slot in (1, 2))
    if low is not None and high is not None:
        return max(abs(low), abs(high))
    return max(bound, abs(low or 0.0), abs(high or 0.0))


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0.0 or b == 0.0 else a * b


def _layer(node: ir.Node, of: Callable[[ir.Value | None], float]) -> float:
    weight = weight_array(node.inputs[1])
    if weight is None or weight.ndim < 2:
        return _attention(node, of)
    rows = _by_input(node, weight.astype(np.float64))
    norm = _source(node.inputs[0], "LayerNormalization", "RMSNormalization")
    bias = of(node.inputs[2]) if len(node.inputs) > 2 else 0.0
    if norm is not None and is_op(node, "MatMul", "Gemm"):
        return _behind_norm(norm, rows) * _ROUNDING + bias
    return _product(of(node.inputs[0]), float(np.abs(rows).sum(0).max(initial=0.0))) + bias


def _by_input(node: ir.Node, weight: NDArray) -> NDArray:
    """The weight as [inputs of one output, outputs]."""
    transposed = is_op(node, "Conv") or (is_op(node, "Gemm") and int_attr(node, "transB", 0) == 1)
    return weight.reshape(weight.shape[0], -1).T if transposed else weight.reshape(-1, weight.shape[-1])


def _behind_norm(norm: ir.Node, rows: NDArray) -> float:
    """|LayerNorm(x) W| <= sqrt(C) ||gamma * W_o|| + |beta W_o| (Cauchy-Schwarz): a fold between them does not change it."""
    gamma, beta = const_array(norm.inputs[1]), const_array(norm.inputs[2]) if len(norm.inputs) > 2 else None
    if gamma is None or gamma.size not in (1, len(rows)):
        return math.inf
    length = np.sqrt(np.square(gamma.reshape(-1, 1) * rows).sum(0))
    shift = np.abs(beta.reshape(-1) @ rows) if beta is not None and beta.size == len(rows) else np.zeros(1)
    return float((math.sqrt(len(rows)) * length + shift).max())


def _attention(node: ir.Node, of: Callable[[ir.Value | None], float]) -> float:
    """A product of two computed values: at most twice the second behind a softmax, else K max|a| max|b| where K is known."""
    a = node.inputs[0]
    if _source(a, "Softmax") is not None:
        return 2 * of(node.inputs[1])
    length = a.shape[-1] if a is not None and a.shape is not None and len(a.shape) else None
    return _product(of(a), of(node.inputs[1])) * length if isinstance(length, int) else math.inf


def _source(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of these types that makes `value`, behind Q/DQ and casts."""
    producer = value.producer() if value is not None else None
    while producer is not None and (is_quantizer(producer) or is_op(producer, "Cast", "Identity", "Dropout")):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer if is_op(producer, *op_types) else None
