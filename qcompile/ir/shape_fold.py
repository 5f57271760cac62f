"""Fold the integer vectors that exporters compute from known dimensions: Reshape targets, pads, slice bounds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.edit import add_constant
from qcompile.ir.partial import Dim
from qcompile.ir.shapes import dims, int_vector, rank, reshape_target, shape_vector

_VECTOR_SLOTS = dict.fromkeys(("Expand", "Pad", "Reshape", "Split", "Tile", "Unsqueeze"), (1,)) | {"Slice": (1, 2, 3, 4)}


def fold_shapes(graph: ir.Graph) -> int:
    """Replace computed integer vectors whose elements are known by constants; returns how many.

    A Reshape target may keep one unknown size (-1) and sizes copied from its input (0).  Infer shapes and call again until it
    returns 0: each round may make more dimensions known.
    """
    sites = [(node, slot) for node in graph for slot in _VECTOR_SLOTS.get(node.op_type, ()) if not node.domain]
    return sum(_fold(graph, node, slot) for node, slot in sites)


def _fold(graph: ir.Graph, node: ir.Node, slot: int) -> bool:
    value = ops.input_at(node, slot)
    if value is None or ops.is_const(value) or rank(value) != 1 or value.dtype not in (None, ir.DataType.INT64):
        return False
    vector = int_vector(value)
    if node.op_type == "Reshape" and (vector is None or -1 in vector):
        vector = _target(node) or vector
    elif node.op_type == "Expand" and vector is None:
        vector = _broadcast(node)
    if vector is None:
        return False
    node.replace_input_with(slot, add_constant(graph, f"{value.name}_folded", np.array(vector, dtype=np.int64)))
    return True


def _target(node: ir.Node) -> tuple[int, ...] | None:
    """A constant target of the same effect, or None when more than one size is unknown."""
    target = reshape_target(node)
    if target is None or ops.int_attr(node, "allowzero", 0):
        return None
    source = dims(node.inputs[0]) or ()
    unknown = [i for i, d in enumerate(target) if not isinstance(d, int)]
    if len(unknown) > 1:
        unknown = [i for i in unknown if not _copied(target, source, i)]
    if len(unknown) > 1 or (unknown and 0 in target):
        return None
    return tuple(-1 if i in unknown else d if isinstance(d, int) else 0 for i, d in enumerate(target))


def _broadcast(node: ir.Node) -> tuple[int, ...] | None:
    """A constant Expand target: 1 where the input already has the (symbolic) size."""
    target, source = shape_vector(node.inputs[1]), dims(node.inputs[0])
    if target is None or source is None or len(target) < len(source):
        return None
    aligned = (None,) * (len(target) - len(source)) + source
    sizes = [d if isinstance(d, int) else 1 if d is not None and d == s else None for d, s in zip(target, aligned, strict=True)]
    known = tuple(d for d in sizes if d is not None)
    return known if len(known) == len(sizes) else None


def _copied(target: tuple[Dim, ...], source: tuple[Dim, ...], i: int) -> bool:
    return target[i] is not None and i < len(source) and source[i] == target[i]
