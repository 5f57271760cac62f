"""TensorRT's MXFP8 operators in standard ones: E8M0 codes are looked up in a table of powers of two.

TRT_MXFP8DynamicQuantize(x)      ->  e = ceil(log2(max |block| / 448));  E4M3(x / 2^e), e + 127 in uint8
TRT_MXFP8DequantizeLinear(q, e)  ->  DQ(q, 2^(e - 127))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.execute.emulate.build import FLOAT, Lines, rank_of
from qcompile.quant.blockformats import MXFP8_BLOCK
from qcompile.quant.minifloat import E4M3, E8M0_BIAS, e8m0_values

_FP8, _UINT8, _INT32, _BOOL = ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.BOOL
_LAST = 254
DYNAMIC, DEQUANTIZE = "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"


def emulate_mxfp8(graph: ir.Graph) -> bool:
    """Rewrite every MXFP8 operator of `graph`; whether there was one."""
    found = [n for n in graph if n.op_type in (DYNAMIC, DEQUANTIZE)]
    for node in found:
        _dynamic_quantize(graph, node) if node.op_type == DYNAMIC else _dequantize(graph, node)
    return bool(found)


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    codes, exponents = node.inputs[0], node.inputs[1]
    assert codes is not None and exponents is not None
    op = Lines(graph, node)
    if exponents.const_value is not None:
        scale = op.constant(e8m0_values(exponents.const_value.numpy()))
    else:
        scale = _power(op, op.cast(exponents, _INT32))
    attributes: dict[str, Any] = {n: node.attributes[n].as_int() for n in ("axis", "block_size")}
    wanted = ir.DataType(node.attributes["output_dtype"].as_int())
    op.finish(op.cast(op("DequantizeLinear", codes, scale, **attributes), wanted))


def _dynamic_quantize(graph: ir.Graph, node: ir.Node) -> None:
    x = node.inputs[0]
    rank = rank_of(x)
    if x is None or rank is None:
        raise ModelError(f"{node.name}: the rank of its input is not known, so it cannot be emulated; run onnx shape inference")
    op = Lines(graph, node)
    blocks, top = op.block_amax(op.cast(x, FLOAT), rank, MXFP8_BLOCK)
    exponents = _exponents(op, top)
    ratio = op("Div", blocks, _power(op, exponents))
    clipped = op("Max", op("Min", ratio, op.number(E4M3.largest)), op.number(-E4M3.largest))
    codes = op.join_blocks(op.cast(clipped, _FP8), rank, _FP8)
    op.finish(codes, op.join_blocks(op.cast(exponents, _UINT8), rank, _UINT8))


def _exponents(op: Lines, top: ir.Value) -> ir.Value:
    """int32 codes ceil(log2(top / 448)) + 127: the logarithm is off by one at most, two comparisons correct it exactly."""
    octaves = op("Mul", op("Log", op("Div", top, op.number(E4M3.largest))), op.number(1 / np.log(2)))
    guess = op("Add", op("Ceil", octaves), op.number(E8M0_BIAS))
    bounded = op("Max", op("Min", guess, op.number(_LAST - 1)), op.number(1))
    code = op.cast(bounded, _INT32)
    small = op.cast(op("Greater", top, op("Mul", _power(op, code), op.number(E4M3.largest)), dtype=_BOOL), _INT32)
    lower = op("Sub", code, op.constant(np.int32(1)), dtype=_INT32)
    large = op.cast(op("LessOrEqual", top, op("Mul", _power(op, lower), op.number(E4M3.largest)), dtype=_BOOL), _INT32)
    return op("Sub", op("Add", code, small, dtype=_INT32), large, dtype=_INT32)


def _power(op: Lines, code: ir.Value) -> ir.Value:
    """2^(code - 127), exact."""
    return op("Gather", op.constant(e8m0_values(np.arange(_LAST + 1))), code)
