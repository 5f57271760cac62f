"""BatchNormalization behind a quantized layer: into its weight's scale and its bias, so that the codes stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, replace_value
from qcompile.ir.ops import CONV_OPS, const_array, float_attr, input_at, int_attr, is_op
from qcompile.ir.quantizers import DEQUANTIZE, Affine, affine
from qcompile.passes.forms.unify_qdq.weights import rewrite_constant

F64 = NDArray[np.float64]


def fold_norms(graph: ir.Graph) -> list[str]:
    """W' = W f has the same codes with the scale s |f|, negated where f < 0."""
    return [str(bn.name) for bn in list(graph) if is_op(bn, "BatchNormalization") and _folded(graph, bn)]


def _folded(graph: ir.Graph, bn: ir.Node) -> bool:
    layer, affine_map = _layer(bn), _affine_map(bn)
    dq = None if layer is None else _weight(layer)
    found = None if dq is None else affine(dq)
    if layer is None or dq is None or found is None or affine_map is None:
        return False
    f, h = affine_map
    axis, codes, bias = _output_axis(layer), const_array(dq.inputs[0]), _bias(layer, f.size)
    if axis is None or codes is None or bias is None or not _fits(found, codes, f, axis):
        return False
    _scale(graph, dq, found, f, axis)
    _add_bias(graph, layer, bias * f + h)
    source = bn.inputs[0]
    assert source is not None
    replace_value(graph, bn.outputs[0], source)
    graph.remove(bn, safe=True)
    return True


def _layer(bn: ir.Node) -> ir.Node | None:
    """The convolution or Gemm that the normalization alone reads."""
    value = bn.inputs[0]
    maker = None if value is None else value.producer()
    alone = value is not None and len(list(value.uses())) == 1 and not value.is_graph_output()
    return maker if alone and is_op(maker, *CONV_OPS, "Gemm") else None


def _weight(layer: ir.Node) -> ir.Node | None:
    maker = layer.inputs[1].producer() if layer.inputs[1] is not None else None
    alone = maker is not None and is_op(maker, DEQUANTIZE) and len(list(maker.outputs[0].uses())) == 1
    return maker if alone and maker is not None and const_array(maker.inputs[0]) is not None else None


def _affine_map(bn: ir.Node) -> tuple[F64, F64] | None:
    """The normalization as x f + h; None where it is no constant map of each channel."""
    arrays = [const_array(v) for v in bn.inputs[1:5]]
    found = [a.astype(np.float64) for a in arrays if a is not None]
    if len(found) < 4 or int_attr(bn, "training_mode", 0) or any(o.uses() for o in bn.outputs[1:]):
        return None
    gamma, beta, mean, var = found
    f = gamma / np.sqrt(var + float_attr(bn, "epsilon", 1e-5))
    return f, beta - mean * f


def _output_axis(layer: ir.Node) -> int | None:
    if is_op(layer, "Gemm"):
        return 0 if int_attr(layer, "transB", 0) else 1
    return 0 if is_op(layer, "Conv") else (1 if int_attr(layer, "group", 1) == 1 else None)


def _bias(layer: ir.Node, channels: int) -> F64 | None:
    """The layer's bias [channels], 0 where there is none; None where it is computed."""
    value = input_at(layer, 2)
    if value is None:
        return np.zeros(channels)
    array = const_array(value)
    factor = float_attr(layer, "beta", 1.0) if is_op(layer, "Gemm") else 1.0
    fits = array is not None and factor == 1.0 and array.size in (1, channels)
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,)) if fits and array is not None else None


def _fits(found: Affine, codes: NDArray, f: F64, axis: int) -> bool:
    """Whether the scale can take the factor, and no code that must be negated has no negative."""
    if found.block or not np.all(f) or found.zero_point.any() or (found.scale.ndim and found.axis != axis):
        return False
    lowest = -128 if found.dtype == ir.DataType.INT8 else None
    turned = np.moveaxis(codes, axis, 0)[f < 0]
    return not turned.size or (codes.dtype == np.int8 and bool((turned != lowest).all()))


def _scale(graph: ir.Graph, dq: ir.Node, found: Affine, f: F64, axis: int) -> None:
    shape = [-1 if i == axis else 1 for i in range(len(_const_shape(dq)))]
    sign = np.where(f < 0, -1, 1).reshape(shape)
    if (f < 0).any():
        rewrite_constant(graph, dq, found, lambda codes: (codes * sign).astype(codes.dtype))
    scale = add_constant(graph, f"{dq.name}_scale", (found.scale * np.abs(f)).astype(np.float32))
    zero = add_constant(graph, f"{dq.name}_zero_point", np.zeros(f.size).astype(found.dtype.numpy()), found.dtype)
    dq.resize_inputs(3)
    dq.replace_input_with(1, scale)
    dq.replace_input_with(2, zero)
    dq.attributes["axis"] = ir.AttrInt64("axis", axis)


def _const_shape(dq: ir.Node) -> tuple[int, ...]:
    codes = const_array(dq.inputs[0])
    assert codes is not None
    return codes.shape


def _add_bias(graph: ir.Graph, layer: ir.Node, bias: F64) -> None:
    layer.resize_inputs(3)
    layer.replace_input_with(2, add_constant(graph, f"{layer.name}_bias", bias.astype(np.float32)))
