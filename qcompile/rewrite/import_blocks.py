"""NVFP4 and MXFP8 blocks, as `rewrite.block_formats` writes them, read back as quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.decide.quantizer import Quantizer
from qcompile.ir.ops import const_array, const_scalar, int_attr, is_op
from qcompile.ir.quantizers import DEQUANTIZE, FP4_DYNAMIC, MXFP8_DEQUANTIZE, MXFP8_DYNAMIC
from qcompile.quant.blockformats import MXFP8_BLOCK, NVFP4_BLOCK, nvfp4_from_blocks
from qcompile.quant.minifloat import e8m0_values
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import PerBlock, QParams, QuantSpec


@dataclass(frozen=True, eq=False)
class Blocks:
    """`made` is what becomes of `source`: a constant of codes, or a tensor that is quantized at run time."""

    source: ir.Value
    made: ir.Value
    quantizer: Quantizer


def blocks(graph: ir.Graph) -> Iterator[Blocks]:
    """All of `graph` whose constants are known."""
    for node in list(graph):
        found = _nvfp4(node) if is_op(node, DEQUANTIZE) else _mxfp8(node) if node.op_type == MXFP8_DEQUANTIZE else None
        if found is not None:
            yield found


def _nvfp4(dq: ir.Node) -> Blocks | None:
    """DQ(codes, DQ(block scales, tensor scale)), both constant or both made by one dynamic quantizer."""
    codes, scale = dq.inputs[0], dq.inputs[1]
    inner = None if scale is None else scale.producer()
    tensor_scale = const_scalar(inner.inputs[1]) if inner is not None and is_op(inner, DEQUANTIZE) else None
    if codes is None or inner is None or tensor_scale is None or int_attr(dq, "block_size", 0) != NVFP4_BLOCK:
        return None
    maker, stored = codes.producer(), const_array(codes)
    if maker is not None and maker.op_type == FP4_DYNAMIC:
        params = QParams(np.asarray(tensor_scale), np.zeros((), np.int64), tensor_scale)
        return _dynamic(maker, dq, QuantSpec(FLOAT4E2M1, PerBlock(-1, NVFP4_BLOCK)), params)
    scales = const_array(inner.inputs[0])
    if stored is None or scales is None:
        return None
    spec = QuantSpec(FLOAT4E2M1, PerBlock(int_attr(dq, "axis", 1) % stored.ndim, NVFP4_BLOCK))
    params = nvfp4_from_blocks(scales.astype(np.float32), tensor_scale)
    return Blocks(codes, dq.outputs[0], Quantizer(spec, params, stored, imported=True))


def _mxfp8(dq: ir.Node) -> Blocks | None:
    codes = dq.inputs[0]
    maker, stored, exponents = (None if codes is None else codes.producer()), const_array(codes), const_array(dq.inputs[1])
    if codes is None:
        return None
    if maker is not None and maker.op_type == MXFP8_DYNAMIC:
        spec = QuantSpec(FLOAT8E4M3FN, PerBlock(-1, MXFP8_BLOCK))
        return _dynamic(maker, dq, spec, QParams(np.ones(()), np.zeros((), np.int64)))
    if stored is None or exponents is None:
        return None
    spec = QuantSpec(FLOAT8E4M3FN, PerBlock(int_attr(dq, "axis", 1) % stored.ndim, MXFP8_BLOCK))
    scale = e8m0_values(exponents).astype(np.float64)
    params = QParams(scale, np.zeros(scale.shape, np.int64))
    return Blocks(codes, _wide(dq.outputs[0]), Quantizer(spec, params, stored, imported=True))


def _dynamic(maker: ir.Node, dq: ir.Node, spec: QuantSpec, params: QParams) -> Blocks | None:
    source, made = maker.inputs[0], _wide(dq.outputs[0])
    if source is None or source.shape is None:
        return None
    narrowed = source.producer()
    if narrowed is not None and is_op(narrowed, "Cast") and narrowed.inputs[0] is not None:
        source = narrowed.inputs[0]
    granularity = PerBlock(len(source.shape or ()) - 1, NVFP4_BLOCK if params.tensor_scale is not None else MXFP8_BLOCK)
    return Blocks(source, made, Quantizer(spec.with_granularity(granularity), params, imported=True))


def _wide(value: ir.Value) -> ir.Value:
    """Behind the Cast to float32 that alone reads a tensor of another type."""
    uses = list(value.uses())
    return uses[0][0].outputs[0] if len(uses) == 1 and is_op(uses[0][0], "Cast") else value
