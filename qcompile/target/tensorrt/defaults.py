"""What the TensorRT targets leave in float unless --quantize asks for it, and why."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompile.ir.ops import int_attr, is_op, static_shape
from qcompile.structure.scores import Scores
from qcompile.target.target import Request

_CHANNELS = {"int": 4, "float": 16}  # an fp8 convolution of a picture has no kernel (measured), an int8 one gains nothing
_SMALLEST = 16


def default_refusal(node: ir.Node, slot: int, request: Request, kept: Mapping[ir.Node, str]) -> str | None:
    """Why a weighted layer stays in float by default, or None."""
    if is_op(node, "ConvTranspose"):
        return "TensorRT has no low-precision deconvolution kernel"
    shape = tuple(d or 0 for d in static_shape(node.inputs[slot]) or ())
    if is_op(node, "Gemm", "MatMul") and min(shape) < _SMALLEST:
        return f"a {'x'.join(str(d) for d in shape)} matrix is too small for a tensor-core kernel"
    if not request.native:
        return None
    if is_op(node, "Conv") and (reason := _few_channels(node, shape[1], request)):
        return reason
    return kept.get(node)


def _few_channels(conv: ir.Node, per_group: int, request: Request) -> str | None:
    qtype, groups = request.scheme.activation, int_attr(conv, "group", 1)
    depthwise = groups > 1 and per_group == 1
    limit = _CHANNELS.get(qtype.family, 0) if qtype is not None else 0
    if qtype is None or depthwise or per_group * groups >= limit:
        return None
    return f"{per_group * groups} input channels are fewer than the {limit} that a {qtype.name} convolution needs to pay off"


def attention_refusal(scores: Scores[ir.Node], request: Request) -> str | None:
    """Why the products of an attention stay in float by default, or None (tensorrt-rtx 1.7.1, seen with `qcompile audit`)."""
    qtype = request.scheme.fallback or request.scheme.activation
    if qtype is None or qtype.family != "float" or not request.native:
        return None
    shape = scores.matmul.outputs[0].shape
    if shape is not None and isinstance(shape[-1], int) and isinstance(shape[-2], int):
        return None
    return "its sequence length is dynamic: an FP8 attention of dynamic length falls apart into separate kernels (fix the length)"
