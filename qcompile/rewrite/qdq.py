"""Decisions made real: the Q/DQ nodes of one quantizer; each form of codes stands in one row of `_FORMS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.decide.decisions import Use, quantizers
from qcompile.decide.quantizer import Quantizer, value_at
from qcompile.decide.storable import holds_float_scales
from qcompile.errors import ModelError
from qcompile.ir.edit import add_constant, drop_if_unused, insert_after, new_node, redirect, swap_output
from qcompile.quant.affine import storage_dtype
from qcompile.quant.blockformats import block_format
from qcompile.quant.qtype import INT8, QType
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams, QuantSpec
from qcompile.rewrite.block_formats import mxfp8_activation, mxfp8_weight, nvfp4_activation, nvfp4_weight
from qcompile.rewrite.companding import companded_activation, companded_weight

_BODIES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_ROUNDING = {  # numpy type, half the distance of neighbours, smallest number
    ir.DataType.FLOAT16: (np.dtype(np.float16), 2.0**-11, 2.0**-24),
    ir.DataType.BFLOAT16: (np.dtype(ml_dtypes.bfloat16), 2.0**-8, 2.0**-126),
}


@dataclass(frozen=True)
class _Form:
    """The nodes of one kind of quantizer: those that make a constant from its codes, and those that round an activation."""

    weight: Callable[[ir.Graph, ir.Value, Quantizer, QParams], list[ir.Node]]
    activation: Callable[[ir.Graph, ir.Value, Quantizer, QParams], list[ir.Node]]


def _form(spec: QuantSpec) -> _Form:
    blocks = block_format(spec)
    return _FORMS[blocks.name if blocks is not None else spec.qtype.family]


def grouped(graph: ir.Graph, one_quantizer: bool) -> list[list[Use]]:
    """The uses of each quantizer; under `one_quantizer` an activation may have no more than that.

    Raises:
        ModelError: uses of one activation disagree on its quantizer, or a decision has no scale.
    """
    groups, first = quantizers(graph), dict[ir.Value, Quantizer]()
    for node, slot, quantizer in (use for uses in groups for use in uses):
        if quantizer.qparams is None:
            raise ModelError(
                f"the decision for input {slot} of {node.name!r} has no scale yet; run annotate and rtn before insert-qdq"
            )
        value = value_at(node, slot)
        if first.setdefault(value, quantizer) is not quantizer and one_quantizer and value.name not in graph.initializers:
            raise ModelError(f"tensor {value.name!r} has two different quantizers, which TensorRT cannot fuse; keep one in float")
    return groups


def materialise(graph: ir.Graph, uses: list[Use], body: str) -> QParams:
    """Put the Q/DQ nodes of one quantizer in front of its uses; returns its scales as they are stored.

    `body` is the type of what is not quantized, which scales take too: float32, float16 or bfloat16.  A rounded scale moves the
    values of a quantizer that has codes of its own, never its codes: the weight is (codes - zero_point) stored scale.

    Raises:
        ModelError: codes have another shape than their weight, or a weight is given a form that only activations have.
    """
    quantizer, value, form = uses[0].quantizer, uses[0].value, _form(uses[0].quantizer.spec)
    rounds = body != "float32" and holds_float_scales(quantizer)
    params = round_scale(quantizer.known, _BODIES[body]) if rounds else quantizer.known
    if value.const_value is not None:
        made = _weight(graph, value, quantizer, params, form)
        insert_after(graph, value, *made)
        redirect(value, made[-1].outputs[0], [(n, i) for n, i, _ in uses])
        drop_if_unused(graph, value)
    else:
        _activation(graph, value, uses, params, form)
    return params


def _weight(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams, form: _Form) -> list[ir.Node]:
    try:
        return form.weight(graph, value, quantizer, params)
    except ValueError as e:
        raise ModelError(f"weight {value.name!r}: {e}") from e


def _activation(graph: ir.Graph, value: ir.Value, uses: list[Use], params: QParams, form: _Form) -> None:
    at_output = any(slot < 0 for _, slot, _ in uses)
    readers = list(value.uses()) if at_output else [(node, slot) for node, slot, _ in uses]
    chain = form.activation(graph, value, uses[0].quantizer, params)
    insert_after(graph, value, *chain)
    redirect(value, chain[-1].outputs[0], readers)
    if at_output and value.is_graph_output():
        swap_output(graph, value, chain[-1].outputs[0])


def unsigned_weights(graph: ir.Graph) -> None:
    """Store int8 codes of constants as uint8, 128 higher, with the zero point 128 higher: the same values."""
    for node in list(graph):
        constants = [v for v in node.inputs if v is not None and v.const_value is not None and v.dtype == ir.DataType.INT8]
        if node.op_type != "DequantizeLinear" or node.inputs[0] not in constants:
            continue
        for slot, value in enumerate(node.inputs):
            if value in constants:
                node.replace_input_with(slot, _raised(graph, value))
                drop_if_unused(graph, value)


def _raised(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    assert codes.const_value is not None
    moved = (codes.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
    return add_constant(graph, str(codes.name), moved, ir.DataType.UINT8)


def round_scale(params: QParams, body: ir.DataType) -> QParams:
    """Scales rounded up to the type of the float rest, so that codes are computed with the very scale that the engine sees.

    They must lie in its range (`qcompile.decide.storable`); a few below its smallest number become that.
    """
    dtype, ulp, least = _ROUNDING[body]
    half = params.scale.astype(dtype)
    half = np.where(half.astype(np.float64) < params.scale * (1 - ulp), np.nextafter(half, dtype.type(np.inf)), half)
    return QParams(np.maximum(half.astype(np.float64), least), params.zero_point)


def _axis_attributes(quantizer: Quantizer) -> dict[str, int]:
    match quantizer.spec.granularity:
        case PerTensor():
            return {}
        case PerAxis(axis):
            return {"axis": axis}
        case PerBlock(axis, size):
            return {"axis": axis, "block_size": size}


def _storage(qtype: QType) -> ir.DataType:
    return ir.DataType[qtype.storage]


def _constants(graph: ir.Graph, stem: str, params: QParams, qtype: QType, dtype: np.dtype) -> tuple[ir.Value, ir.Value]:
    scale = add_constant(graph, f"{stem}_scale", params.scale.astype(dtype))
    codes = params.zero_point.astype(np.float64).astype(storage_dtype(qtype))
    return scale, add_constant(graph, f"{stem}_zero_point", codes, _storage(qtype))


def _affine_weight(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """DequantizeLinear of the codes."""
    assert value.const_value is not None
    qtype, array = quantizer.spec.qtype, value.const_value.numpy()
    stored = add_constant(graph, f"{value.name}_quantized", quantizer.coded(array, params), _storage(qtype))
    dtype = array.dtype if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16 else np.dtype(np.float32)
    scale, zero = _constants(graph, str(value.name), params, qtype, dtype)
    name, attributes = f"{value.name}_DequantizeLinear", _axis_attributes(quantizer)
    return [new_node(graph, "DequantizeLinear", [stored, scale, zero], name=name, like=value, attributes=attributes)]


def _affine_activation(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """[Clip ->] QuantizeLinear -> DequantizeLinear reading `value`."""
    qtype, stem = quantizer.spec.qtype, str(value.name)
    dtype = np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
    scale, zero = _constants(graph, stem, params, qtype, dtype)
    attributes = _axis_attributes(quantizer)
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


_AFFINE = _Form(_affine_weight, _affine_activation)
_FORMS = {
    "int": _AFFINE,
    "float": _AFFINE,
    "companded": _Form(companded_weight, companded_activation),
    "nvfp4": _Form(nvfp4_weight, nvfp4_activation),
    "mxfp8": _Form(mxfp8_weight, mxfp8_activation),
}
