"""LSTM layers in com.microsoft's DynamicQuantizeLSTM: weights as codes, inputs and states quantized at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, drop_if_unused, new_node
from qcompile.ir.notes import copy_notes
from qcompile.ir.ops import const_array, input_at, int_attr, is_op
from qcompile.quant.qtype import INT8

_DOMAIN, _OP, _WEIGHTS, _OPERANDS = "com.microsoft", "DynamicQuantizeLSTM", (1, 2), 8


def lstms(graph: ir.Graph) -> list[ir.Node]:
    """The LSTM layers of the top-level graph."""
    return [n for n in graph if is_op(n, "LSTM")]


def unfit(lstm: ir.Node) -> str | None:
    """Why a layer has no such form, None if it has."""
    weights = [input_at(lstm, slot) for slot in _WEIGHTS]
    if any(const_array(w) is None or w is None or w.dtype != ir.DataType.FLOAT for w in weights):
        return "its weights are not constant float32 numbers"
    return "its batch axis comes first (layout 1), which ONNX Runtime does not compute" if int_attr(lstm, "layout", 0) else None


def dynamic(opsets: dict[str, int], graph: ir.Graph, lstm: ir.Node, *, unsigned: bool) -> ir.Node:
    """The quantized layer in the place of `lstm`, whose outputs keep their names.

    int8 codes have one scale a direction: with one a channel they reach further and sums of uint8 by int8 products saturate on
    x86 CPUs without VNNI.  uint8 codes, 128 higher, have one a channel.
    """
    codes, parameters = list[ir.Value](), list[ir.Value]()
    for slot, name in zip(_WEIGHTS, "WR", strict=True):
        made, scale, zero = _quantized(const_array(lstm.inputs[slot]), unsigned)
        stem = f"{lstm.name}_{name}"
        codes.append(add_constant(graph, stem, made))
        parameters += [add_constant(graph, f"{stem}_scale", scale), add_constant(graph, f"{stem}_zero_point", zero)]
    rest = [input_at(lstm, slot) for slot in range(3, _OPERANDS)]
    inputs = [lstm.inputs[0], *codes, *rest, *parameters]
    attributes = {k: a.value for k, a in lstm.attributes.items() if k != "layout"}
    node = new_node(
        graph,
        "DynamicQuantizeLSTM",
        inputs,
        name=str(lstm.name),
        attributes=attributes,
        outputs=len(lstm.outputs),
        domain=_DOMAIN,
    )
    copy_notes(lstm, node)
    _replace(graph, lstm, node)
    opsets.setdefault(_DOMAIN, 1)
    return node


def _quantized(weight: NDArray[Any] | None, unsigned: bool) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any]]:
    """[directions, 4 hidden, inputs] -> codes [directions, inputs, 4 hidden], scales and zero points."""
    assert weight is not None
    turned, top = np.swapaxes(weight.astype(np.float64), 1, 2), float(INT8.qmax)
    largest = np.abs(turned).max(axis=1 if unsigned else (1, 2), initial=0.0)
    scale = np.where(largest > 0, largest / top, 1.0).astype(np.float32)
    each = scale[:, None, :] if unsigned else scale[:, None, None]
    codes = np.clip(np.rint(turned / each), -top, top)
    zero = np.full(scale.shape, 128 if unsigned else 0, np.uint8 if unsigned else np.int8)
    return (codes + 128).astype(np.uint8) if unsigned else codes.astype(np.int8), scale, zero


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, new.outputs, strict=True):
        name = before.name
        after.type, after.shape = before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name, after.name = f"{name}_float" if name else name, name
    weights = [v for slot in _WEIGHTS if (v := old.inputs[slot]) is not None]
    new.name = old.name
    graph.remove(old, safe=True)
    for weight in weights:
        drop_if_unused(graph, weight)
