"""Models of float16, bfloat16 or float64, computed in float32: every other type stays, and so does the interface."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass

from qcompile.ir.edit import add_constant, bypass, insert_after, new_node, redirect, swap_output
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.ops import is_op
from qcompile.ir.schemas import is_tensor, signature
from qcompile.ir.spill import constant_tensor

FLOAT = ir.DataType.FLOAT
OTHERS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
_OWN = "com.microsoft"  # its operators take float32 wherever they take float16
_LARGEST = float(np.finfo(np.float32).max)


def other_floats(model: ir.Model) -> frozenset[ir.DataType]:
    """The floating-point types beside float32 that something is computed or stored in; Casts alone compute nothing."""
    ends = (v for node in model.graph.all_nodes() if not is_op(node, "Cast") for v in (*node.inputs, *node.outputs))
    found = {v.dtype for v in ends if v is not None and _is_other(v)}
    stored = {attr.as_tensor().dtype for node in model.graph.all_nodes() for attr in _tensors(node)}
    return OTHERS & (found | stored)


def widen(model: Model) -> frozenset[ir.DataType]:
    """Compute `model` in float32, in place; the types that it was computed in, none if it was float32 already.

    Inputs and outputs keep their types behind and in front of a Cast, operators without a schema theirs too.  float64 numbers
    beyond float32 end at its largest.
    """
    if model.ir.functions:
        InlinePass()(model.ir)
    infer_shapes(model)
    found = other_floats(model.ir)
    if found:
        _widen(model.ir)
        infer_shapes(model)
    return found


def computed(model: Model) -> Model:
    """`model`, or a copy whose outputs are the float32 tensors in front of the Casts that give them their narrower types: what is
    rounded once more at the end shows no small difference."""
    found = {i: v for i, v in enumerate(map(_in_front, model.graph.outputs)) if v is not None}
    if not found:
        return model
    copy = model.clone()
    for i in found:
        source = _in_front(copy.graph.outputs[i])
        assert source is not None
        copy.graph.outputs[i] = source
    return copy


def _in_front(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    source = node.inputs[0] if node is not None and is_op(node, "Cast") and _is_other(value) else None
    wide = source is not None and source.dtype == FLOAT and not source.is_graph_input() and not source.is_graph_output()
    return source if wide else None


def _widen(model: ir.Model) -> None:
    graph = model.graph
    kept = _kept_sequences(model)
    unknown = (n for n in graph.all_nodes() if n.domain != _OWN and signature(n, model.opset_imports) is None)
    plugins = list(dict.fromkeys([*unknown, *(n for n in graph.all_nodes() if _handles(n, kept))]))
    taken = [(n, i, v.dtype) for n in plugins for i, v in enumerate(n.inputs) if v is not None and _is_other(v)]
    made = {v: v.dtype for n in plugins for v in n.outputs if _is_other(v)}
    outputs = {v: v.dtype for v in graph.outputs if _is_other(v) and v.producer() is not None}
    _cast_inputs(graph)
    for body in model.graphs():
        _widen_constants(graph, body)
        for value in [*(body.inputs if body is not graph else ()), *(v for n in body for v in n.outputs)]:
            if value.dtype in OTHERS and value not in made and value not in kept:
                value.type = _wide_type(value.type)
    for node in graph.all_nodes():
        if node not in plugins:
            _widen_attributes(node)
    for node, slot, dtype in taken:
        _cast_in_front(graph, node, slot, dtype or FLOAT)
    for value in made:
        home = _home(value, graph)
        _read_wide(home, value, given=home is not graph and value.is_graph_output())
    for value, dtype in outputs.items():
        _cast_output(graph, value, dtype or FLOAT)
    for node in list(graph.all_nodes()):
        _drop_cast(graph, node)


def _kept_sequences(model: ir.Model) -> frozenset[ir.Value]:
    """Sequences and optional values of the model where one of them is an input or an output: those keep their type, and tensors
    change theirs on the way in and out."""
    values = [v for g in model.graphs() for v in (*g.inputs, *(v for n in g for v in n.outputs))]
    held = frozenset(v for v in values if v.dtype in OTHERS and not is_tensor(v))
    return held if held & {*model.graph.inputs, *model.graph.outputs} else frozenset()


def _handles(node: ir.Node, kept: frozenset[ir.Value]) -> bool:
    """Whether the node itself, no body of it, puts tensors into a kept sequence or takes them out."""
    bodies = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    return not bodies and any(v in kept for v in (*node.inputs, *node.outputs) if v is not None)


def _home(value: ir.Value, graph: ir.Graph) -> ir.Graph:
    node = value.producer()
    return node.graph if node is not None and isinstance(node.graph, ir.Graph) else graph


def _wide_type(kind: ir.TypeProtocol | None) -> ir.TypeProtocol:
    """The same container of float32; a new object, for copies of a graph share theirs."""
    match kind:
        case ir.SequenceType() | ir.OptionalType():
            return type(kind)(_wide_type(kind.elem_type))
        case _:
            return ir.TensorType(FLOAT)


def _is_other(value: ir.Value) -> bool:
    return value.dtype in OTHERS and is_tensor(value)


def _cast_inputs(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if _is_other(value) and value.name not in graph.initializers:
            _read_wide(graph, value)


def _read_wide(graph: ir.Graph, value: ir.Value, given: bool = False) -> None:
    """Let the readers of a tensor that keeps its type read it in float32; `given`: whoever gets it from a body, too."""
    uses = list(value.uses())
    if not uses and not given:
        return
    cast = _cast(graph, value, FLOAT, f"{value.name}_wide")
    insert_after(graph, value, cast)
    redirect(value, cast.outputs[0], uses)
    if given:
        swap_output(graph, value, cast.outputs[0])
        cast.outputs[0].type = ir.TensorType(FLOAT)


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    if not value.is_graph_output() or value.dtype == dtype:
        return
    cast = _cast(graph, value, dtype, f"{value.name}_given_back")
    insert_after(graph, value, cast)
    swap_output(graph, value, cast.outputs[0])
    cast.outputs[0].type = ir.TensorType(dtype)


def _cast_in_front(graph: ir.Graph, node: ir.Node, slot: int, dtype: ir.DataType) -> None:
    value = node.inputs[slot]
    assert value is not None and node.graph is not None
    if value.dtype != dtype:
        cast = _cast(graph, value, dtype, f"{value.name}_narrow")
        node.graph.insert_before(node, [cast])
        node.replace_input_with(slot, cast.outputs[0])


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = new_node(graph, "Cast", [value], name=name, like=value, attributes={"to": int(dtype)})
    cast.outputs[0].type = ir.TensorType(dtype)
    return cast


def _widen_constants(graph: ir.Graph, body: ir.Graph) -> None:
    for value in [v for v in body.initializers.values() if v.dtype in OTHERS and v.const_value is not None]:
        assert value.const_value is not None
        array = _wide(value.const_value.numpy())
        if value.is_graph_output():
            redirect(value, add_constant(graph, f"{value.name}_wide", array), list(value.uses()))
        else:
            value.const_value, value.type = constant_tensor(graph, array, str(value.name)), ir.TensorType(FLOAT)


def _widen_attributes(node: ir.Node) -> None:
    for name in _TYPES:
        attr = node.attributes.get(name)
        if attr is not None and attr.type == ir.AttributeType.INT and not attr.is_ref() and attr.as_int() in OTHERS:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT))
    for attr in list(_tensors(node)):
        if (tensor := attr.as_tensor()).dtype in OTHERS:
            node.attributes[attr.name] = ir.AttrTensor(attr.name, ir.Tensor(_wide(tensor.numpy())))


def _tensors(node: ir.Node) -> Iterator[ir.Attr]:
    return (a for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR and not a.is_ref())


def _wide(array: NDArray) -> NDArray[np.float32]:
    if array.dtype == np.float64:
        array = np.where(np.isinf(array), array, np.clip(array, -_LARGEST, _LARGEST))
    return array.astype(np.float32)


def _drop_cast(graph: ir.Graph, node: ir.Node) -> None:
    """Of float32 to itself; bodies keep theirs at their ends."""
    source = node.inputs[0] if is_op(node, "Cast") else None
    if source is None or source.dtype != FLOAT or node.outputs[0].dtype != FLOAT:
        return
    if node.graph is graph:
        bypass(graph, node)
    elif isinstance(node.graph, ir.Graph) and not node.outputs[0].is_graph_output():
        bypass(node.graph, node)
