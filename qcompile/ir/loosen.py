"""A quantized graph without rounding: what codes stand for, cut at their limits, so that a small error stays small.

Q(x)   ->  clip(x / s + z, lowest code, highest code)        DQ(q)  ->  (q - z) s
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, erase_dead, new_node, replace_value
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_const, is_data_movement, is_op
from qcompile.ir.qoperators import spell_qdq
from qcompile.ir.quantizers import DEQUANTIZE, QUANTIZE, Affine, affine
from qcompile.ir.widen import widen

_FLOAT = ir.DataType.FLOAT
_INTEGERS = {ir.DataType[f"{sign}INT{bits}"] for sign in ("", "U") for bits in (4, 8, 16)}
_SMALL = {ir.DataType.FLOAT8E4M3FN: float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)}


def loosened(model: Model) -> Model:
    """A copy of `model` in float32 whose activations are not rounded; weights stay what their codes stand for.

    Raises:
        ModelError: an operator on codes that cannot be read (`qcompile.ir.qoperators`).
    """
    copy = model.clone()
    spell_qdq(copy)
    widen(copy)
    for q in [n for n in copy.graph if is_op(n, QUANTIZE) and not is_const(n.inputs[0])]:
        _loosen(copy.graph, q)
    erase_dead(copy)
    return copy


def _loosen(graph: ir.Graph, q: ir.Node) -> None:
    found, region = affine(q), _region(q)
    source = q.inputs[0]
    if found is None or found.scale.ndim or region is None or source is None or source.dtype not in (None, _FLOAT):
        return
    movers, ends = region
    if any((a := affine(dq)) is None or a.scale.ndim or dq.outputs[0].dtype not in (None, _FLOAT) for dq in ends):
        return
    for node in movers:
        _on_floats(graph, node)
    _replace(graph, q, _limited(graph, q, source, found))
    for dq in ends:
        own, codes = affine(dq), dq.inputs[0]
        assert own is not None and codes is not None
        _replace(graph, dq, _chain(graph, dq, codes, ("Sub", float(own.zero_point)), ("Mul", float(own.scale))))


def _region(q: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """What only moves the codes, and the DQ nodes behind; None where anything else reads them."""
    movers, ends, front = list[ir.Node](), list[ir.Node](), [q.outputs[0]]
    while front:
        value = front.pop()
        if value.is_graph_output():
            return None
        for node, _ in value.uses():
            if is_op(node, DEQUANTIZE) and node.graph is q.graph:
                ends.append(node)
            elif _moves(node, value) and node.graph is q.graph:
                front += [] if node in movers else [node.outputs[0]]
                movers.append(node)
            else:
                return None
    return list(dict.fromkeys(movers)), list(dict.fromkeys(ends))


def _moves(node: ir.Node, value: ir.Value) -> bool:
    alone = all(v is value or v is None or is_const(v) for v in node.inputs)
    return len(node.outputs) == 1 and alone and (is_data_movement(node) or is_op(node, "Clip", "MaxPool", "Relu"))


def _on_floats(graph: ir.Graph, node: ir.Node) -> None:
    node.outputs[0].type = ir.TensorType(_FLOAT)
    for slot, value in enumerate(node.inputs):
        array = const_array(value)
        if value is not None and array is not None and value.dtype in _INTEGERS:
            node.replace_input_with(slot, add_constant(graph, f"{value.name}_float", array.astype(np.float32)))


def _limited(graph: ir.Graph, q: ir.Node, source: ir.Value, found: Affine) -> ir.Value:
    low, high = _limits(found.dtype)
    codes = _chain(graph, q, source, ("Div", float(found.scale)), ("Add", float(found.zero_point)))
    return _chain(graph, q, codes, ("Max", low), ("Min", high))


def _limits(dtype: ir.DataType) -> tuple[float, float]:
    if dtype in _SMALL:
        return -_SMALL[dtype], _SMALL[dtype]
    signed = dtype.name.startswith("INT")
    return (-(2.0 ** (dtype.bitwidth - 1)), 2.0 ** (dtype.bitwidth - 1) - 1) if signed else (0.0, 2.0**dtype.bitwidth - 1)


def _chain(graph: ir.Graph, node: ir.Node, value: ir.Value, *operations: tuple[str, float]) -> ir.Value:
    for op, number in operations:
        constant = add_constant(graph, f"{node.name}_{op}", np.asarray(number, np.float32))
        made = new_node(graph, op, [value, constant], name=f"{node.name}_{op}_loose")
        made.outputs[0].type, made.outputs[0].shape = ir.TensorType(_FLOAT), value.shape
        graph.insert_before(node, made)
        value = made.outputs[0]
    return value


def _replace(graph: ir.Graph, node: ir.Node, made: ir.Value) -> None:
    replace_value(graph, node.outputs[0], made)
    graph.remove(node, safe=True)
