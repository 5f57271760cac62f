"""Attention masks: values that only ever reach a Softmax, where -inf means: nothing of this."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import is_data_movement, is_op
from qcompile.ir.optable import ops_with

_CARRIES = ops_with("picks") | {"Add", "Mul", "Cast", "Identity", "Trilu", "ScatterND"}
_SINKS = ("Softmax", "LogSoftmax", "ReduceMax", "MaxPool", "GlobalMaxPool", "ArgMax")
_MASKED = "qcompile.masked"
_MASK_SLOT = 3  # of the standard Attention


def masked_tensors(graph: ir.Graph) -> frozenset[str]:
    """The masks among the inputs, and what is computed of them alone; a part of a graph knows what `keep_masked` told it."""
    known = graph.meta.get(_MASKED)
    if known is not None:
        return known
    inputs = [v for v in graph.inputs if v.name not in graph.initializers and is_mask(v)]
    return frozenset(str(v.name) for each in inputs for v in (each, *(mask_region(each, tested=True) or ())))


def keep_masked(part: ir.Graph, masked: frozenset[str]) -> None:
    """`part` of a graph with these masks: an activation that it takes from an earlier part is none."""
    part.meta[_MASKED] = masked


def is_mask(value: ir.Value) -> bool:
    """Whether a float input is a mask: infinities in it are meant."""
    floats = value.dtype is not None and value.dtype.is_floating_point()
    return floats and bool(value.uses()) and mask_region(value, tested=True) is not None


def mask_region(start: ir.Value, *, tested: bool = False) -> list[ir.Value] | None:
    """The computed tensors between a constant and the Softmaxes that read it; None if it also goes elsewhere.

    `tested`: it may be asked where it is infinite; who changes the mask's numbers must not allow that.
    """
    sinks = (*_SINKS, "IsInf") if tested else _SINKS
    seen: dict[ir.Value, None] = {}
    todo = [start]
    while todo:
        value = todo.pop()
        if value.is_graph_output():
            return None
        for node, slot in value.uses():
            if is_op(node, *sinks) or (is_op(node, "Attention") and slot == _MASK_SLOT):
                continue
            if not _carries(node, slot):
                return None
            todo += [v for v in node.outputs if v not in seen]
            seen.update(dict.fromkeys(node.outputs))
    return list(seen)


def _carries(node: ir.Node, slot: int) -> bool:
    return is_op(node, *_CARRIES) or is_data_movement(node) or (is_op(node, "Sub") and slot == 0)
