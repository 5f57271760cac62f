"""Decisions made real: the Q/DQ nodes of one quantizer."""

from __future__ import annotations

from collections import defaultdict

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.decisions import Decision, decisions, value_at
from qcompile.errors import ModelError
from qcompile.ir.edit import add_constant, drop_if_unused, insert_after, new_node, redirect, swap_output
from qcompile.pipeline.base import PassContext
from qcompile.quant.affine import quantize
from qcompile.quant.qtype import INT8, QType
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams
from qcompile.rewrite.block_formats import block_activation, block_weight
from qcompile.rewrite.companding import companded_chain

Use = tuple[ir.Node, int, Decision]
_BODIES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_ROUNDING = {  # numpy type, half the distance of neighbours, smallest number, smallest with a useful precision
    ir.DataType.FLOAT16: (np.dtype(np.float16), 2.0**-11, 2.0**-24, 2.0**-20),
    ir.DataType.BFLOAT16: (np.dtype(ml_dtypes.bfloat16), 2.0**-8, 2.0**-126, 0.0),
}


def grouped(graph: ir.Graph, ctx: PassContext) -> dict[tuple[str, str], list[Use]]:
    """Uses by (tensor, quantizer).

    Raises:
        ModelError: uses of one tensor disagree on its quantizer, or a decision has no scale.
    """
    groups: dict[tuple[str, str], list[Use]] = defaultdict(list)
    for node, slot, decision in decisions(graph):
        if decision.qparams is None:
            raise ModelError(
                f"the decision for input {slot} of {node.name!r} has no scale yet; run annotate and rtn before insert-qdq"
            )
        groups[(str(value_at(node, slot).name), decision.quantizer)].append((node, slot, decision))
    tensors: dict[str, str] = {}
    for value, quantizer in groups:
        if (
            tensors.setdefault(value, quantizer) != quantizer
            and ctx.target.name in ("trt", "rtx")
            and value not in graph.initializers
        ):
            raise ModelError(f"tensor {value!r} has two different quantizers, which TensorRT cannot fuse; keep one in float")
    return groups


def materialise(graph: ir.Graph, uses: list[Use], ctx: PassContext) -> QParams:
    """Put the Q/DQ nodes of one quantizer in front of its uses; returns its scales as they are stored."""
    node, slot, decision = uses[0]
    value, body = value_at(node, slot), _BODIES[ctx.target.body(ctx.scheme)]
    params = decision.qparams
    assert params is not None
    if body != ir.DataType.FLOAT and decision.spec.block_format is None and decision.spec.qtype.family != "companded":
        params = round_scale(params, body)
    if value.const_value is not None:
        made = _weight(graph, value, decision, params)
        insert_after(graph, value, *made)
        redirect(value, made[-1].outputs[0], [(n, i) for n, i, _ in uses])
        drop_if_unused(graph, value)
    else:
        _activation(graph, value, uses, decision, params)
    return params


def round_scale(params: QParams, body: ir.DataType) -> QParams:
    """Scales rounded up to the type of the float rest, so that codes are computed with the very scale that the engine sees.

    A quantizer whose scales all lie below float16's useful range keeps them; `fp16` leaves it in float32.
    """
    dtype, ulp, least, useful = _ROUNDING[body]
    if params.scale.max(initial=0.0) < useful:
        return params
    half = params.scale.astype(dtype)
    half = np.where(half.astype(np.float64) < params.scale * (1 - ulp), np.nextafter(half, dtype.type(np.inf)), half)
    return QParams(np.maximum(half.astype(np.float64), least), params.zero_point)


def _axis_attributes(decision: Decision) -> dict[str, int]:
    match decision.spec.granularity:
        case PerTensor():
            return {}
        case PerAxis(axis):
            return {"axis": axis}
        case PerBlock(axis, size):
            return {"axis": axis, "block_size": size}


def _storage(qtype: QType) -> ir.DataType:
    return ir.DataType[qtype.storage]


def _codes_dtype(qtype: QType) -> np.dtype:
    return np.dtype(_storage(qtype).numpy())


def _constants(graph: ir.Graph, stem: str, params: QParams, qtype: QType, dtype: np.dtype) -> tuple[ir.Value, ir.Value]:
    scale = add_constant(graph, f"{stem}_scale", params.scale.astype(dtype))
    zero = add_constant(
        graph, f"{stem}_zero_point", params.zero_point.astype(np.float64).astype(_codes_dtype(qtype)), _storage(qtype)
    )
    return scale, zero


def _weight(graph: ir.Graph, value: ir.Value, decision: Decision, params: QParams) -> list[ir.Node]:
    assert value.const_value is not None
    if decision.spec.block_format is not None:
        graph.opset_imports.setdefault("trt", 1)
        return block_weight(graph, value, decision, params)
    qtype = decision.spec.qtype
    array = value.const_value.numpy()
    codes: NDArray = np.asarray(quantize(array, params, qtype, decision.spec.granularity)).astype(_codes_dtype(qtype))
    stored = add_constant(graph, f"{value.name}_quantized", codes, _storage(qtype))
    dtype = array.dtype if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16 else np.dtype(np.float32)
    scale, zero = _constants(graph, str(value.name), params, qtype, dtype)
    name = f"{value.name}_DequantizeLinear"
    attributes = _axis_attributes(decision)
    return [new_node(graph, "DequantizeLinear", [stored, scale, zero], name=name, like=value, attributes=attributes)]


def _activation(graph: ir.Graph, value: ir.Value, uses: list[Use], decision: Decision, params: QParams) -> None:
    at_output = any(slot < 0 for _, slot, _ in uses)
    readers = list(value.uses()) if at_output else [(node, slot) for node, slot, _ in uses]
    chain = _chain(graph, value, decision, params)
    insert_after(graph, value, *chain)
    redirect(value, chain[-1].outputs[0], readers)
    if at_output and value.is_graph_output():
        swap_output(graph, value, chain[-1].outputs[0])


def _chain(graph: ir.Graph, value: ir.Value, decision: Decision, params: QParams) -> list[ir.Node]:
    """[Clip ->] QuantizeLinear -> DequantizeLinear reading `value`."""
    qtype, stem = decision.spec.qtype, str(value.name)
    if decision.spec.block_format is not None:
        return block_activation(graph, value, decision, params)
    dtype = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
    if qtype.family == "companded":
        return companded_chain(graph, value, params, qtype, dtype)
    scale, zero = _constants(graph, stem, params, qtype, dtype)
    attributes = _axis_attributes(decision)
    if graph.opset_imports.get("", 0) >= 21 and qtype == INT8 and not params.zero_point.any():
        return _without_zero_point(graph, value, scale, zero)
    clip = [_clip(graph, value, params, qtype, dtype)] if qtype.narrow else []
    source = clip[0].outputs[0] if clip else value
    q = new_node(graph, "QuantizeLinear", [source, scale, zero], name=f"{stem}_QuantizeLinear", attributes=attributes)
    q.outputs[0].shape, q.outputs[0].type = value.shape, ir.TensorType(_storage(qtype))
    dq = new_node(
        graph, "DequantizeLinear", [q.outputs[0], scale, zero], name=f"{stem}_DequantizeLinear", like=value, attributes=attributes
    )
    return [*clip, q, dq]


def _without_zero_point(graph: ir.Graph, value: ir.Value, scale: ir.Value, zero: ir.Value) -> list[ir.Node]:
    """From opset 21 the type is an attribute; with an int8 zero point ONNX Runtime 1.31 fails to load a static MatMul + Add."""
    drop_if_unused(graph, zero)
    q = new_node(
        graph,
        "QuantizeLinear",
        [value, scale],
        name=f"{value.name}_QuantizeLinear",
        attributes={"output_dtype": int(ir.DataType.INT8)},
    )
    q.outputs[0].shape, q.outputs[0].type = value.shape, ir.TensorType(ir.DataType.INT8)
    return [q, new_node(graph, "DequantizeLinear", [q.outputs[0], scale], name=f"{value.name}_DequantizeLinear", like=value)]


def _clip(graph: ir.Graph, value: ir.Value, params: QParams, qtype: QType, dtype: np.dtype) -> ir.Node:
    low = (qtype.qmin - params.zero_point.astype(np.float64)) * params.scale
    high = (qtype.qmax - params.zero_point.astype(np.float64)) * params.scale
    bounds = [add_constant(graph, f"{value.name}_{n}", np.asarray(b, dtype)) for n, b in (("clip_min", low), ("clip_max", high))]
    return new_node(graph, "Clip", [value, *bounds], name=f"{value.name}_Clip", like=value)
