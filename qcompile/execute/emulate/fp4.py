"""FP4 (E2M1) without FP4 kernels: twice an E2M1 value is a small integer, so int8 codes with half the scale are exact.

DQ(w_fp4, s)                   ->  DQ(int8(2 w), s / 2)
TRT_FP4DynamicQuantize(x, s_t) ->  s_b = E4M3(max |block| / 6 / s_t), 1 for 0;  2 E2M1(x / (s_b s_t)) in int8, s_b
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.execute.emulate.build import FLOAT, Lines, rank_of
from qcompile.quant.blockformats import NVFP4_BLOCK
from qcompile.quant.minifloat import E2M1, E4M3

_FP4, _FP8, _INT8, _BOOL = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8, ir.DataType.BOOL
DYNAMIC = "TRT_FP4DynamicQuantize"


def emulate_fp4(graph: ir.Graph) -> bool:
    """Rewrite every FP4 quantizer and dequantizer of `graph`; whether there was one."""
    readers = [n for n in graph if n.op_type == "DequantizeLinear" and _reads_fp4(n)]
    quantizers = [n for n in graph if n.op_type == DYNAMIC]
    for node in quantizers:
        _dynamic_quantize(graph, node)
    for node in readers:
        _dequantize(graph, node)
    return bool(readers or quantizers)


def _reads_fp4(node: ir.Node) -> bool:
    codes = node.inputs[0]
    assert codes is not None
    maker = codes.producer()
    return codes.dtype == _FP4 or (maker is not None and maker.op_type == DYNAMIC and codes.index() == 0)


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale = node.inputs[0], node.inputs[1]
    assert codes is not None and scale is not None
    op, wanted = Lines(graph, node), node.outputs[0].dtype or _computed_type(scale)
    if codes.const_value is not None:
        codes = op.constant((2 * codes.const_value.numpy().astype(np.float32)).astype(np.int8))
    half = op("Mul", op.cast(scale, FLOAT), op.number(0.5))
    attributes: dict[str, Any] = {n: node.attributes[n].as_int() for n in ("axis", "block_size") if n in node.attributes}
    op.finish(op.cast(op("DequantizeLinear", codes, half, **attributes), wanted))


def _computed_type(scale: ir.Value | None) -> ir.DataType:
    """The type of a scale, which is that of its own scale if it is dequantized."""
    if scale is not None and scale.dtype is not None:
        return scale.dtype
    maker = scale.producer() if scale is not None else None
    return _computed_type(maker.inputs[1]) if maker is not None and maker.op_type == "DequantizeLinear" else FLOAT


def _dynamic_quantize(graph: ir.Graph, node: ir.Node) -> None:
    x, tensor_scale = node.inputs[0], node.inputs[1]
    rank = rank_of(x)
    if x is None or tensor_scale is None or rank is None:
        raise ModelError(f"{node.name}: the rank of its input is not known, so it cannot be emulated; run onnx shape inference")
    op = Lines(graph, node)
    scale = op.cast(tensor_scale, FLOAT)
    blocks, top = op.block_amax(op.cast(x, FLOAT), rank, NVFP4_BLOCK)
    scales = _block_scales(op, top, scale)
    divisor = op("Mul", op.cast(scales, FLOAT), scale)
    codes = op.join_blocks(_doubled(op, op("Div", blocks, divisor)), rank, _INT8)
    op.finish(codes, op.join_blocks(scales, rank, _FP8))


def _block_scales(op: Lines, top: ir.Value, scale: ir.Value) -> ir.Value:
    ratio = op("Div", op("Div", top, op.number(E2M1.largest)), scale)
    rounded = op.cast(op.cast(op("Min", ratio, op.number(E4M3.largest)), _FP8), FLOAT)
    zero = op("Equal", rounded, op.number(0), dtype=_BOOL)
    return op.cast(op("Where", zero, op.number(1), rounded), _FP8)


def _doubled(op: Lines, ratio: ir.Value) -> ir.Value:
    """2 E2M1(ratio) in int8: steps of 0.5 below 2, 1 below 4, and 2 up to 6, half to even."""
    size = op("Min", op("Abs", ratio), op.number(E2M1.largest))
    small = op("Less", size, op.number(2), dtype=_BOOL)
    middle = op("Less", size, op.number(4), dtype=_BOOL)
    step = op("Where", small, op.number(0.5), op("Where", middle, op.number(1), op.number(2)))
    doubled = op("Mul", op("Mul", op("Round", op("Div", size, step)), step), op.number(2))
    return op.cast(op("Mul", doubled, op("Sign", ratio)), _INT8)
