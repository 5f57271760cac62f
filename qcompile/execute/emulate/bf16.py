"""bfloat16 in float32: ONNX Runtime's CPU provider has few bfloat16 kernels, but it rounds to bfloat16 correctly.

    before: y: bf16 = MatMul(x: bf16, w: bf16)
    after:  y: f32 = Cast(Cast(MatMul(x, w), bf16), f32), all values of x, w and y bfloat16 numbers

Sums inside an operator are float32, as in the accumulators of the kernels; every stored tensor is rounded, half to even.
The same for float16 is stricter than ONNX Runtime, whose CPU provider leaves out the rounding between two operators that
it computes in float32: `round_stored` shows an overflow that it would hide.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import insert_after, new_node, redirect, swap_output
from qcompile.ir.ops import is_data_movement

_FLOAT = ir.DataType.FLOAT
_TYPES = ("to", "dtype", "output_dtype")


def emulate_bf16(graph: ir.Graph) -> bool:
    """Rewrite every bfloat16 tensor of `graph` (bodies of If and Loop too) in place; True if there was one.

    Graph inputs and outputs of type bfloat16 become float32.
    """
    return round_stored(graph, ir.DataType.BFLOAT16)


def round_stored(graph: ir.Graph, dtype: ir.DataType) -> bool:
    """The same for any narrow floating-point type: compute in float32, round each stored tensor to `dtype`."""
    found = [_emulate(g, dtype) for g in [graph, *graph.subgraphs()]]
    return any(found)


def _emulate(graph: ir.Graph, dtype: ir.DataType) -> bool:
    values = [v for v in _values(graph) if v.dtype == dtype]
    computed = [v for v in values if (node := v.producer()) is not None and not is_data_movement(node)]
    attributes = [_widen_attributes(node, dtype) for node in graph]
    for value in values:
        _widen(value)
    for value in computed:
        _round(graph, value, dtype)
    return bool(values) or any(attributes)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _widen(value: ir.Value) -> None:
    value.type = ir.TensorType(_FLOAT)
    if value.const_value is not None:
        value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)


def _widen_attributes(node: ir.Node, dtype: ir.DataType) -> bool:
    """Targets of Cast and the like, and the tensors of Constant and ConstantOfShape."""
    types = [n for n in _TYPES if n in node.attributes and node.attributes[n].as_int() == int(dtype)]
    for name in types:
        node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
    attribute = node.attributes.get("value")
    tensor = attribute.as_tensor() if attribute is not None and attribute.type == ir.AttributeType.TENSOR else None
    if tensor is None or tensor.dtype != dtype:
        return bool(types)
    node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(tensor.numpy().astype(np.float32)))
    return True


def _round(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Let every reader of `value` see it rounded to `dtype`."""
    uses = list(value.uses())
    down = new_node(graph, "Cast", [value], name=f"{value.name}_narrow", like=value, attributes={"to": int(dtype)})
    up = new_node(graph, "Cast", [down.outputs[0]], name=f"{value.name}_rounded", like=value, attributes={"to": int(_FLOAT)})
    down.outputs[0].type = ir.TensorType(dtype)
    insert_after(graph, value, down, up)
    redirect(value, up.outputs[0], uses)
    if value.is_graph_output():
        swap_output(graph, value, up.outputs[0])
