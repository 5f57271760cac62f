"""NVFP4 and MXFP8 as TensorRT reads them: weights behind DequantizeLinear of codes and of scales, activations dynamic.

NVFP4 weight       DQ(w_fp4, DQ(s_b fp8, s_t), axis, block_size=16)                       (plain ONNX, opset 23)
NVFP4 activation   x4, x8 = trt::TRT_FP4DynamicQuantize(x, s_t);  DQ(x4, DQ(x8, s_t), axis=-1, block_size=16)
MXFP8 weight       trt::TRT_MXFP8DequantizeLinear(w_fp8, e uint8, axis, block_size=32)
MXFP8 activation   x8, e = trt::TRT_MXFP8DynamicQuantize(x);  trt::TRT_MXFP8DequantizeLinear(x8, e, axis=-1, block_size=32)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.decide.quantizer import Quantizer
from qcompile.ir.edit import add_constant, new_node
from qcompile.quant.minifloat import E8M0_BIAS
from qcompile.quant.spec import PerBlock, QParams

_FP4, _FP8, _UINT8 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8
_TRT = "trt"


def nvfp4_weight(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Nodes that dequantize the constant `value`; the last one makes it."""
    codes, blocks = _codes(graph, value, quantizer, params, _FP4), _blocks(quantizer)
    scale, tensor_scale = _scale_constants(graph, value, params)
    inner = _scale_dequantize(graph, value, scale, tensor_scale)
    return [inner, _blocked_dequantize(graph, value, codes, inner.outputs[0], blocks)]


def nvfp4_activation(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Nodes that quantize `value` [.., K] to blocks at run time and dequantize it; the last one makes it."""
    last, scale = PerBlock(-1, _blocks(quantizer).size), _tensor_scale(graph, value, params)
    q = _quantizer(graph, value, "TRT_FP4DynamicQuantize", [value, scale], last, {"scale_type": int(_FP8)}, (_FP4, _FP8))
    inner = _scale_dequantize(graph, value, q.outputs[1], scale)
    return [q, inner, _blocked_dequantize(graph, value, q.outputs[0], inner.outputs[0], last)]


def mxfp8_weight(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Nodes that dequantize the constant `value`; the last one makes it."""
    codes = _codes(graph, value, quantizer, params, _FP8)
    exponents = np.frexp(params.scale)[1] - 1 + E8M0_BIAS
    scale = add_constant(graph, f"{value.name}_scale", exponents.astype(np.uint8))
    return [_mxfp8_dequantize(graph, value, codes, scale, _blocks(quantizer))]


def mxfp8_activation(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams) -> list[ir.Node]:
    """Nodes that quantize `value` [.., K] to blocks at run time and dequantize it; the last one makes it."""
    last = PerBlock(-1, _blocks(quantizer).size)
    q = _quantizer(graph, value, "TRT_MXFP8DynamicQuantize", [value], last, {"output_dtype": int(_FP8)}, (_FP8, _UINT8))
    return [q, _mxfp8_dequantize(graph, value, q.outputs[0], q.outputs[1], last)]


def _blocks(quantizer: Quantizer) -> PerBlock:
    assert isinstance(quantizer.spec.granularity, PerBlock)
    return quantizer.spec.granularity


def _codes(graph: ir.Graph, value: ir.Value, quantizer: Quantizer, params: QParams, dtype: ir.DataType) -> ir.Value:
    assert value.const_value is not None
    codes = quantizer.coded(value.const_value.numpy().astype(np.float32), params)
    return add_constant(graph, f"{value.name}_quantized", codes, dtype)


def _scale_constants(graph: ir.Graph, value: ir.Value, params: QParams) -> tuple[ir.Value, ir.Value]:
    assert params.tensor_scale is not None
    stored = (params.scale / params.tensor_scale).astype(np.float32).astype(_FP8.numpy())
    return add_constant(graph, f"{value.name}_scale", stored, _FP8), _tensor_scale(graph, value, params)


def _tensor_scale(graph: ir.Graph, value: ir.Value, params: QParams) -> ir.Value:
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    return add_constant(graph, f"{value.name}_tensor_scale", np.asarray(params.tensor_scale, dtype))


def _scale_dequantize(graph: ir.Graph, value: ir.Value, scale: ir.Value, tensor_scale: ir.Value) -> ir.Node:
    name = f"{value.name}_scale_DequantizeLinear"
    node = new_node(graph, "DequantizeLinear", [scale, tensor_scale], name=name, like=scale)
    node.outputs[0].type = value.type
    return node


def _blocked_dequantize(graph: ir.Graph, value: ir.Value, codes: ir.Value, scale: ir.Value, blocks: PerBlock) -> ir.Node:
    attributes = {"axis": blocks.axis, "block_size": blocks.size}
    name = f"{value.name}_DequantizeLinear"
    return new_node(graph, "DequantizeLinear", [codes, scale], name=name, like=value, attributes=attributes)


def _mxfp8_dequantize(graph: ir.Graph, value: ir.Value, codes: ir.Value, scale: ir.Value, blocks: PerBlock) -> ir.Node:
    graph.opset_imports.setdefault(_TRT, 1)
    dtype = value.dtype or ir.DataType.FLOAT
    attributes = {"axis": blocks.axis, "block_size": blocks.size, "output_dtype": int(dtype)}
    name = f"{value.name}_DequantizeLinear"
    return new_node(graph, "TRT_MXFP8DequantizeLinear", [codes, scale], name=name, like=value, attributes=attributes, domain=_TRT)


def _quantizer(
    graph: ir.Graph,
    value: ir.Value,
    op_type: str,
    inputs: list[ir.Value],
    blocks: PerBlock,
    attributes: dict[str, int],
    types: tuple[ir.DataType, ir.DataType],
) -> ir.Node:
    graph.opset_imports.setdefault(_TRT, 1)
    node = new_node(
        graph,
        op_type,
        inputs,
        name=f"{value.name}_DynamicQuantize",
        like=value,
        attributes={"axis": blocks.axis, "block_size": blocks.size, **attributes},
        outputs=2,
        domain=_TRT,
    )
    for output, dtype in zip(node.outputs, types, strict=True):
        output.type = ir.TensorType(dtype)
    if value.shape is not None and isinstance(length := value.shape[-1], int):
        node.outputs[1].shape = ir.Shape([*value.shape[:-1], length // blocks.size])
    return node
