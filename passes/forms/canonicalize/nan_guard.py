"""The guard that torch writes behind a masked softmax, where it does nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.ops import const_array, int_attr, is_op, static_shape
from qcompile.structure.scores import Scores, find_scores

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # a finite score may be infinite in float16
_ONCE = 1.5  # the lowest number of a type, which stands for -inf in many masks, may be added once
_SAME = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand"})


def idle_guard(node: ir.Node) -> ir.Value | None:
    """The probabilities p where `node` is Where(IsNaN(p), 0, p) and no row of p can be NaN: every row keeps a key.

    A softmax gives NaN where all scores of a row are -inf; finite scores under constant masks tell without running.  None where
    a mask is computed, or takes all keys from a row.
    """
    if not is_op(node, "Where"):
        return None
    chosen, nothing, kept = node.inputs
    test = None if chosen is None else chosen.producer()
    if test is None or not is_op(test, "IsNaN") or kept is None or test.inputs[0] is not kept:
        return None
    softmax, zero = kept.producer(), const_array(nothing)
    if softmax is None or not is_op(softmax, "Softmax") or zero is None or np.any(zero != 0):
        return None
    scores = find_scores(softmax) if _over_last_axis(softmax) else None
    return kept if isinstance(scores, Scores) and _keeps_a_key(scores) else None


def _over_last_axis(softmax: ir.Node) -> bool:
    axis, shape = int_attr(softmax, "axis", -1), static_shape(softmax.inputs[0])
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _keeps_a_key(scores: Scores[ir.Node]) -> bool:
    """Whether each row has a finite score: what is added and multiplied is finite, up to the last mask, which leaves a key."""
    made, masked, added = scores.matmul.outputs[0], False, 0.0
    for node in scores.between:
        others = [v for v in node.inputs if v is not made]
        made = node.outputs[0]
        if masked:
            return False
        if is_op(node, *_SAME) or (is_op(node, "Cast") and int_attr(node, "to", 0) in _WIDE):
            continue
        operand = const_array(others[0]) if len(others) == 1 else None
        if operand is None or operand.dtype.kind != "f":
            return False
        masked = not np.isfinite(operand).all()
        added += _reach(node, operand)
        if added > _ONCE or not (_leaves_a_key(node, operand) if masked else _stays_finite(node, operand)):
            return False
    return True


def _reach(node: ir.Node, operand: NDArray[Any]) -> float:
    """How far what is added goes, in parts of its type's largest number."""
    finite = np.abs(operand[np.isfinite(operand)]).max(initial=0)
    return float(finite / np.finfo(operand.dtype).max) if is_op(node, "Add", "Sub") else 0.0


def _leaves_a_key(node: ir.Node, mask: NDArray[Any]) -> bool:
    lowest = np.isfinite(mask) | np.isneginf(mask)
    return is_op(node, "Add") and bool(lowest.all() and np.isfinite(np.atleast_1d(mask)).any(axis=-1).all())


def _stays_finite(node: ir.Node, operand: NDArray[Any]) -> bool:
    divides = is_op(node, "Div") and const_array(node.inputs[1]) is not None and bool(np.all(operand != 0))
    return divides or is_op(node, "Add", "Sub", "Mul")
