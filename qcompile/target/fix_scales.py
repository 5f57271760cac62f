"""Fixes of scales, zero points and constants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qcompile.target.findings import Context
from qcompile.target.fix_edits import Array, add_constant, along, dequantized, drop_attributes, pair_of, readers, rescale
from qcompile.target.rules_common import output_axis, wrong_weight_axis
from qcompile.target.tensorrt.checks import half_network, scale_type
from qcompile.target.tensorrt.shapes import unequal_concat
from qcompile.target.view import DEQUANTIZE_OPS, QUANTIZE_OPS

LARGEST = {"int8": 127.0, "int4": 7.0, "float8e4m3fn": 448.0}
DTYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4), "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
SOFTMAX_SCALE = {"int8": 1 / 127, "float8e4m3fn": 1 / 448}


def scales_to_body_type(c: Context) -> None:
    """Store float32 scales of a float16 (bfloat16) network in its type; a scale that would become 0 or Inf stays."""
    broken = {name for name, _ in scale_type(c)}
    kinds = [t.data_type for t in c.view.model.graph.initializer]
    inputs = [v.type.tensor_type.elem_type for v in c.view.model.graph.input]
    bfloat = [*kinds, *inputs].count(TensorProto.BFLOAT16) > [*kinds, *inputs].count(TensorProto.FLOAT16)
    dtype = np.dtype(ml_dtypes.bfloat16) if bfloat else np.dtype(np.float16)
    cast: dict[str, str] = {}
    for node in c.quantizers if half_network(c) or broken else []:
        scale = c.view.constant(node.input[1])
        if node.name not in broken or scale is None:
            continue
        small = scale.astype(dtype)
        if np.all(np.isfinite(small.astype(np.float64))) and np.all(small.astype(np.float64) > 0):
            cast[node.input[1]] = cast.get(node.input[1]) or add_constant(c, f"{node.input[1]}_half", small)
            node.input[1] = cast[node.input[1]]
    del c.view.model.graph.value_info[:]


def int32_bias_to_float(c: Context) -> None:
    """Replace the DequantizeLinear of int32 codes by the float values."""
    for node in [n for n in c.quantizers if n.op_type == "DequantizeLinear" and c.view.low_type(n) == "int32"]:
        values = dequantized(c, node)
        if values is not None:
            c.view.model.graph.node.remove(node)
            c.view.model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))


def symmetric_int8(c: Context) -> None:
    """Zero points that are not 0, and uint8 codes: int8 around 0 over the same range of values.

    uint8 around 128 keeps its scale (the same grid); elsewhere the scale grows so that nothing clips that did not.
    """
    for node in c.quantizers:
        if node.op_type in DEQUANTIZE_OPS and c.view.constant_proto(node.input[0]) is not None and _needs_symmetry(c, node):
            _symmetric_weight(c, node)
        elif node.op_type in QUANTIZE_OPS and _needs_symmetry(c, node):
            _symmetric_pair(c, node)


def _needs_symmetry(c: Context, node: NodeProto) -> bool:
    zero = c.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    moved = zero is not None and bool(np.any(zero.astype(np.float32) != 0))
    return c.code_type(node) == "uint8" or (moved and c.code_type(node) == "int8")


def _symmetric_pair(c: Context, q: NodeProto) -> None:
    scale = c.view.constant(q.input[1])
    if scale is None:
        return
    zero = c.view.constant(q.input[2]) if len(q.input) > 2 and q.input[2] else np.zeros(scale.shape, np.uint8)
    shift = np.zeros(scale.shape) if zero is None else zero.astype(np.float64)
    low, high = (0, 255) if c.code_type(q) == "uint8" else (-128, 127)
    wide = np.maximum(high - shift, shift - low)
    factor = np.where(wide == 128, 1.0, wide / 127)
    nodes = [q, *readers(c, q)]
    rescale(c, nodes, (scale.astype(np.float64) * factor).astype(scale.dtype), np.zeros(scale.shape, np.int8))
    drop_attributes(q, ["output_dtype"])


def _symmetric_weight(c: Context, dq: NodeProto) -> None:
    scale, codes = c.view.constant(dq.input[1]), c.view.constant(dq.input[0])
    zero = c.view.constant(dq.input[2]) if len(dq.input) > 2 and dq.input[2] else np.zeros((), np.uint8)
    values = dequantized(c, dq)
    if scale is None or codes is None or values is None or zero is None:
        return
    same_grid = bool(np.all(zero.astype(np.int64) == 128)) and c.view.low_type(dq) == "uint8"
    if same_grid:
        dq.input[0] = add_constant(c, f"{dq.input[0]}_int8", (codes.astype(np.int64) - 128).astype(np.int8))
    else:
        _requantize(c, dq, values, "int8", _axis(dq, values.ndim) if scale.size > 1 else None)
    del dq.input[2:]


def _axis(dq: NodeProto, rank: int) -> int:
    return next((int(a.i) for a in dq.attribute if a.name == "axis"), 1) % rank


def _requantize(c: Context, dq: NodeProto, values: Array, kind: str, axis: int | None) -> None:
    """Codes and scales of constant `values` again: `kind`, per tensor or along `axis`, largest magnitude to largest code."""
    wide = values.astype(np.float64)
    others = None if axis is None else tuple(i for i in range(wide.ndim) if i != axis)
    scale = np.maximum(np.abs(wide).max(axis=others), 1e-6) / LARGEST[kind]
    stored = scale.astype(values.dtype)
    ratio = wide / along(stored.astype(np.float64), axis or 0, wide.ndim)
    limited = np.clip(ratio, -LARGEST[kind], LARGEST[kind])
    codes = (limited if kind == "float8e4m3fn" else np.rint(limited)).astype(DTYPES[kind])
    dq.input[0] = add_constant(c, f"{dq.input[0]}_requantized", codes)
    dq.input[1] = add_constant(c, f"{dq.input[1]}_requantized", stored)
    del dq.input[2:]
    drop_attributes(dq, ["axis"])
    if axis is not None:
        dq.attribute.append(helper.make_attribute("axis", axis))


def weights_along_outputs(c: Context) -> None:
    """Quantize constant weights again along the output channels."""
    broken = {name for name, _ in wrong_weight_axis(c)}
    for site in (s for s in c.sites if s.node.name in broken):
        weight, rule = site.weight, c.target.op_rule(site.node.op_type)
        values = None if weight is None else dequantized(c, weight.dq)
        if weight is None or rule is None or values is None or weight.rank is None or weight.type_name not in LARGEST:
            continue
        wanted = output_axis(site, weight.slot, weight.rank, rule)
        name = site.node.input[weight.slot]
        stored = next((a for a in range(values.ndim) if c.view.axis_after(name, a) == wanted), None)
        if stored is not None and c.view.constant_proto(weight.dq.input[0]) is not None:
            _requantize(c, weight.dq, values, weight.type_name, stored)


def one_activation_scale(c: Context) -> None:
    """One scale, the largest, for an activation that has one per channel."""
    for operand in [o for s in c.sites for o in s.activations if o.per_axis]:
        _single_scale(c, operand.dq)


def scalar_scales(c: Context) -> None:
    """Lists of one number become scalars."""
    for operand in [o for s in c.sites for o in s.activations if o.one_scale]:
        _single_scale(c, operand.dq)
    for site in c.sites:
        weight = site.weight
        if weight is not None and weight.one_scale and pair_of(c, weight.dq) is None:
            scale = c.view.constant(weight.dq.input[1])
            if scale is not None:
                rescale(c, [weight.dq], scale.reshape(()), None)
                del weight.dq.input[2:]


def _single_scale(c: Context, dq: NodeProto) -> None:
    q = pair_of(c, dq)
    scale = None if q is None else c.view.constant(q.input[1])
    kind = None if q is None else DTYPES.get(c.code_type(q) or "")
    if q is not None and scale is not None and scale.ndim and kind is not None:
        rescale(c, [q, *readers(c, q)], scale.max().reshape(()), np.zeros((), kind))


def softmax_scales(c: Context) -> None:
    """1/127 (fp8: 1/448) on softmax outputs."""
    for softmax in c.view.of_type("Softmax"):
        for q, slot in c.view.consumers.get(softmax.output[0], []):
            value = SOFTMAX_SCALE.get(c.code_type(q) or "") if q.op_type in QUANTIZE_OPS and slot == 0 else None
            scale = c.view.constant(q.input[1]) if value is not None else None
            if value is not None and scale is not None and scale.size == 1:
                rescale(c, [q, *readers(c, q)], np.full(scale.shape, value, dtype=scale.dtype), None)


def equal_concat_scales(c: Context) -> None:
    """The largest scale for all inputs of a Concat."""
    broken = {name for name, _ in unequal_concat(c)}
    for site in (s for s in c.sites if s.node.name in broken):
        for name in site.node.input[:2]:
            joined = c.view.producer.get(c.view.origin(name))
            if joined is not None and joined.op_type == "Concat":
                _largest_for_all(c, joined)


def _largest_for_all(c: Context, joined: NodeProto) -> None:
    dqs = [dq for x in joined.input if (dq := c.view.dequantizer(x)) is not None]
    pairs = [(dq, q) for dq in dqs if (q := pair_of(c, dq)) is not None]
    scales = [c.view.constant(q.input[1]) for _, q in pairs]
    known: list[NDArray[np.generic]] = [s for s in scales if s is not None and s.size == 1]
    if len(known) < len(joined.input):
        return
    largest = max(known, key=lambda s: float(s.reshape(-1)[0].astype(np.float64)))
    nodes = {id(n): n for dq, q in pairs for n in (dq, q, *readers(c, q))}
    rescale(c, nodes.values(), largest.reshape(()), None)
