"""Companded codes in standard operators: the code by a search among the thresholds, the value by a Gather."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.quantizer import Quantizer
from qcompile.errors import ModelError
from qcompile.ir.edit import add_constant, new_node
from qcompile.quant.companding import Codebook, codebook, kind_of
from qcompile.quant.qtype import QType
from qcompile.quant.spec import QParams

_INT32, _FP8 = ir.DataType.INT32, ir.DataType.FLOAT8E4M3FN
_FP8_OCTAVES = 8  # 2^0 .. 2^-15 times 2^8 are E4M3 numbers


def companded_activation(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Nodes from `value` to the values of its codes."""
    coded, dtype = quantizer.spec.qtype, np.dtype(value.dtype.numpy() if value.dtype is not None else np.float32)
    if coded.storage == "FLOAT8E4M3FN":
        return _powers_in_fp8(graph, value, params, coded, dtype)
    return _table(graph, value, codebook(coded, params), dtype)


def companded_weight(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Raises ModelError: companded codes are for activations."""
    raise ModelError(f"weight {value.name!r} has companded codes, which activations alone can have; give it an integer type")


def _table(graph: ir.Graph, value: ir.Value, book: Codebook, dtype: np.dtype) -> list[ir.Node]:
    """Binary search in ceil(log2 n) steps: code += half where x >= thresholds[code + half - 1], which is exact."""
    stem, depth = str(value.name), math.ceil(math.log2(len(book.values)))
    padded = np.full(2**depth - 1, np.finfo(dtype).max, dtype)
    padded[: len(book.thresholds)] = book.thresholds.astype(dtype)
    zero, chain, code = _number(graph, f"{stem}_code", 0, np.dtype(np.int32)), list[ir.Node](), None
    for half in (2**k for k in reversed(range(depth))):
        if code is None:
            level = add_constant(graph, f"{stem}_threshold", padded[half - 1])
        else:
            source = add_constant(graph, f"{stem}_thresholds", padded[half - 1 :])
            level = _step(graph, chain, "Gather", [source, code], value)
        below = _step(graph, chain, "Less", [value, level], value, ir.DataType.BOOL)
        more = _number(graph, f"{stem}_code", half, np.dtype(np.int32))
        bit = _step(graph, chain, "Where", [below, zero, more], value, _INT32)
        code = bit if code is None else _step(graph, chain, "Add", [code, bit], value, _INT32)
    assert code is not None
    values = np.concatenate([book.values, np.full(2**depth - len(book.values), book.values[-1])])
    _step(graph, chain, "Gather", [add_constant(graph, f"{stem}_values", values.astype(dtype)), code], value)
    return chain


def _powers_in_fp8(graph: ir.Graph, value: ir.Value, params: QParams, coded: QType, dtype: np.dtype) -> list[ir.Node]:
    """s 2^round(log2(P / s)), 0 below the last code, then Q/DQ to E4M3 with scale s 2^-8, which rounds nothing away."""
    stem, scale = str(value.name), float(params.scale)
    chain: list[ir.Node] = []

    def number(name: str, x: float) -> ir.Value:
        return _number(graph, f"{stem}_{name}", x, dtype)

    _, bits, paper = kind_of(coded)
    last = 2**bits - (1 if paper else 2)
    small = _step(graph, chain, "Less", [value, number("cut", scale * 2.0 ** -(last + 0.5))], value, ir.DataType.BOOL)
    held = _step(graph, chain, "Where", [small, number("least", scale * 2.0**-last), value], value)
    octaves = _step(graph, chain, "Log", [_step(graph, chain, "Mul", [held, number("inverse", 1 / scale)], value)], value)
    rounded = _step(
        graph, chain, "Round", [_step(graph, chain, "Mul", [octaves, number("per_octave", 1 / math.log(2))], value)], value
    )
    capped = _step(graph, chain, "Min", [rounded, number("first", 0)], value)
    power = _step(graph, chain, "Exp", [_step(graph, chain, "Mul", [capped, number("octave", math.log(2))], value)], value)
    scaled = _step(graph, chain, "Mul", [power, number("scale", scale)], value)
    kept = _step(graph, chain, "Where", [small, number("zero", 0), scaled], value)
    step = number("fp8_scale", scale * 2.0**-_FP8_OCTAVES)
    origin = add_constant(graph, f"{stem}_fp8_zero_point", np.zeros((), _FP8.numpy()), _FP8)
    codes = _step(graph, chain, "QuantizeLinear", [kept, step, origin], value, _FP8)
    _step(graph, chain, "DequantizeLinear", [codes, step, origin], value)
    return chain


def _step(
    graph: ir.Graph, chain: list[ir.Node], op: str, inputs: list[ir.Value], like: ir.Value, dtype: ir.DataType | None = None
) -> ir.Value:
    node = new_node(graph, op, inputs, name=f"{like.name}_{op}", like=like)
    if dtype is not None:
        node.outputs[0].type = ir.TensorType(dtype)
    chain.append(node)
    return node.outputs[0]


def _number(graph: ir.Graph, name: str, x: float, dtype: np.dtype) -> ir.Value:
    array: NDArray = np.asarray(x, dtype)
    return add_constant(graph, name, array)
