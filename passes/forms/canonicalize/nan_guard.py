"""The guard that torch writes behind a masked softmax: gone where it does nothing, else behind the product with the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import replace_value, sort, splice_after
from qcompile.ir.ops import const_array, const_scalar, int_attr, is_compute, is_data_movement, is_op, static_shape
from qcompile.ir.shapes import rank
from qcompile.passes.forms.canonicalize.operators.masks import Mask
from qcompile.passes.forms.canonicalize.operators.writer import Writer, Written
from qcompile.structure.scores import Scores, find_scores

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # a finite score may be infinite in float16
_ONCE = 1.5  # the lowest number of a type, which stands for -inf in many masks, may be added once
_SAME = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand"})
_CUTS = frozenset({"Slice", "Transpose"})
_STEPS, _ANCESTORS = 8, 256
_MAY_BE_NAN = frozenset({"Log", "Pow", "Softmax", "Sqrt"})


def idle_guard(node: ir.Node) -> ir.Value | None:
    """The probabilities p where `node` is Where(IsNaN(p), 0, p) and no row of p can be NaN: every row keeps a key.

    A softmax gives NaN where all scores of a row are -inf; finite scores under masks that are constant, or chosen from finite
    numbers, tell without running.  None where a mask takes all keys from a row, or may.
    """
    found = _guarded(node)
    return None if found is None or not _keeps_a_key(found[1]) else found[0].outputs[0]


def move_guard(graph: ir.Graph, node: ir.Node, opset: int) -> bool:
    """Where(IsNaN(p), 0, p) V as Where(rows, p V, 0): the rows that see a key are known from the masks; whether it was moved.

    In rows without a key the masks do nothing, so that nothing is NaN on the way.  A fused kernel has no place for the guard in
    front of the product, and integers have no NaN.
    """
    found, uses = _guarded(node), list(node.outputs[0].uses())
    if found is None or len(uses) != 1 or uses[0][1] != 0 or not is_op(uses[0][0], "MatMul"):
        return False
    softmax, scores = found
    masks = [(n, mask) for n in scores.between if (mask := _mask_of(n)) is not None]
    if not masks or not _understood(scores, masks[0][0]) or len(list(softmax.outputs[0].uses())) > 2:
        return False
    if any(_unlike_a_mask(mask) for _, mask in masks):
        return False
    first, product = masks[0][0], uses[0][0]
    w = Writer(graph, first, opset, Written())
    rows = Mask([m for _, m in masks if m.dtype == ir.DataType.BOOL], [m for _, m in masks if m.dtype != ir.DataType.BOOL], True)
    seen = rows.rows(w)
    assert seen is not None
    for each, _ in masks:
        _lift(w, each, seen)
    product.replace_input_with(0, softmax.outputs[0])
    kept = w("Where", seen, product.outputs[0], 0.0, name="kept")
    last = w.nodes.pop()
    graph.insert_before(first, w.nodes)
    splice_after(graph, product.outputs[0], last)
    assert kept.producer() is last
    sort(graph)
    return True


def _guarded(node: ir.Node) -> tuple[ir.Node, Scores[ir.Node]] | None:
    """The softmax over the last axis whose NaN `node` replaces by 0, and its scores."""
    if not is_op(node, "Where") or node.outputs[0].is_graph_output():
        return None
    chosen, nothing, kept = node.inputs
    test = None if chosen is None else chosen.producer()
    if test is None or not is_op(test, "IsNaN") or kept is None or test.inputs[0] is not kept:
        return None
    softmax, zero = kept.producer(), const_array(nothing)
    if softmax is None or not is_op(softmax, "Softmax") or zero is None or np.any(zero != 0):
        return None
    scores = find_scores(softmax) if _over_last_axis(softmax) else None
    return (softmax, scores) if isinstance(scores, Scores) else None


def _mask_of(node: ir.Node) -> ir.Value | None:
    """What `node` adds to the scores, or the test by which it selects from them, if it may take away keys."""
    if is_op(node, "Add"):
        other = node.inputs[1]
        test, array = _chosen_by(other), const_array(other)
        if test is not None:
            return test
        return None if array is not None and np.isfinite(array).all() and _reach(node, array) < _ONCE / 2 else other
    return node.inputs[0] if is_op(node, "Where") else None


def _chosen_by(mask: ir.Value | None) -> ir.Value | None:
    """The test c of Where(c, 0, -inf)."""
    node = None if mask is None else mask.producer()
    if node is None or not is_op(node, "Where"):
        return None
    yes, no = (const_scalar(v) for v in node.inputs[1:])
    return node.inputs[0] if yes == 0 and no is not None and np.isneginf(no) else None


def _understood(scores: Scores[ir.Node], first: ir.Node) -> bool:
    """Whether all between is finite in front of the first mask, and masks alone behind it, that are added or select -inf."""
    made, masked = scores.matmul.outputs[0], False
    for node in scores.between:
        masked = masked or node is first
        if made not in node.inputs[:2] or (masked and not _is_mask(node, made)):
            return False
        if not masked and not (_is_same(node) or _is_finite(node, made)):
            return False
        made = node.outputs[0]
    return masked


def _is_mask(node: ir.Node, made: ir.Value) -> bool:
    if is_op(node, "Where"):
        low = const_array(node.inputs[2])
        return node.inputs[1] is made and low is not None and bool(np.isneginf(low).all())
    return is_op(node, "Add") and node.inputs[0] is made


def _lift(w: Writer, node: ir.Node, seen: ir.Value) -> None:
    """Let the mask of `node` do nothing in rows without a key."""
    test = node.inputs[0] if is_op(node, "Where") else _chosen_by(node.inputs[1])
    if test is None:
        node.replace_input_with(1, w("Where", seen, node.inputs[1], 0.0))
        return
    shown = w("Or", test, w("Not", seen))
    if is_op(node, "Where"):
        node.replace_input_with(0, shown)
        return
    chosen = w("Where", shown, node.inputs[0], -np.inf, name="masked")
    replace_value(w.graph, node.outputs[0], chosen)


def _unlike_a_mask(mask: ir.Value) -> bool:
    """Whether it may hold NaN or more than numbers and -inf: products, logarithms and roots made it, or it is constant."""
    array = const_array(mask)
    if not rank(mask) or (array is not None and array.dtype.kind == "f" and bool((np.isnan(array) | np.isposinf(array)).any())):
        return True
    todo, seen = [mask.producer()], set[ir.Node]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.domain or is_compute(node) or node.op_type in _MAY_BE_NAN or len(seen) > _ANCESTORS:
            return True
        seen.add(node)
        todo += [v.producer() for v in node.inputs if v is not None]
    return False


def _is_same(node: ir.Node) -> bool:
    return is_op(node, *_SAME) or (is_op(node, "Cast") and int_attr(node, "to", 0) in _WIDE)


def _is_finite(node: ir.Node, made: ir.Value) -> bool:
    others = [v for v in node.inputs if v is not made]
    operand = const_array(others[0]) if len(others) == 1 else None
    finite = operand is not None and operand.dtype.kind == "f" and bool(np.isfinite(operand).all())
    return finite and operand is not None and _stays_finite(node, operand)


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
        if _is_same(node):
            continue
        operand = _numbers(others[0]) if len(others) == 1 else None
        if operand is None or operand.dtype.kind != "f":
            return False
        masked = not np.isfinite(operand).all()
        added += _reach(node, operand)
        if added > _ONCE or not (_leaves_a_key(node, operand) if masked else _stays_finite(node, operand)):
            return False
    return True


def _numbers(value: ir.Value | None) -> NDArray[Any] | None:
    """A constant, or one that holds the numbers that a computed mask chooses from."""
    for _ in range(_STEPS):
        node = None if value is None else value.producer()
        if const_array(value) is not None or node is None or not (is_data_movement(node) and node.op_type in _SAME | _CUTS):
            break
        value = node.inputs[0]
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Where"):
        return const_array(value)
    choices = [const_array(v) for v in node.inputs[1:]]
    known = [c.reshape(-1) for c in choices if c is not None]
    numbers = np.concatenate(known) if len(known) == 2 else None
    return numbers if numbers is not None and np.isfinite(numbers).all() else None


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
