"""How movement, look-ups and reductions map intervals."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from qcompile.oracle import interval
from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range, between, exact
from qcompile.oracle.movement import reduced_axes
from qcompile.oracle.scene import Scene, Shape, Transfer, Unbounded

LARGEST_AXIS = (1 << 31) - 1


def same(s: Scene, op: Op) -> Range:
    """The input's own range."""
    return s.of(op, 0)


def _mixed(s: Scene, op: Op) -> Range:
    return s.of(op, 0).hull


def _joined(s: Scene, op: Op) -> Range:
    return interval.join([s.ranges[name].hull for name in op.inputs])


def _padded(s: Scene, op: Op) -> Range:
    fill = s.of(op, 2).hull if s.given(op, 2) else between(0, 0)
    return interval.join([s.of(op, 0).hull, fill]) if op.attributes.get("mode", "constant") == "constant" else s.of(op, 0).hull


def _transpose(s: Scene, op: Op) -> Range:
    rank = len(s.shape(op.inputs[0]))
    a, perm = s.of(op, 0).at_rank(rank), op.attributes.get("perm") or tuple(reversed(range(rank)))
    return a if a.lo.ndim != rank else Range(a.lo.transpose(perm), a.hi.transpose(perm))


def _max_pool(s: Scene, op: Op) -> Range:
    a = s.of(op, 0)
    return a if a.lo.ndim >= 3 and set(a.lo.shape[2:]) == {1} else a.hull


def _shape(s: Scene, op: Op) -> Range:
    sizes = s.shape(op.inputs[0])[op.attributes.get("start", 0) : op.attributes.get("end")]
    return Range(
        exact(np.array([0 if d is None else d for d in sizes], object)),
        exact(np.array([LARGEST_AXIS if d is None else d for d in sizes], object)),
    )


def _constant_of_shape(_: Scene, op: Op) -> Range:
    value = op.attributes.get("value")
    return between(0, 0) if value is None else interval.constant(numpy_helper.to_array(value))


def _range(s: Scene, op: Op) -> Range:
    """Positions: from the start up to the limit, or down to it."""
    return interval.join([s.of(op, 0), s.of(op, 1)]).hull


def _gather(s: Scene, op: Op) -> Range:
    """Table entries that the index can reach."""
    table, index = s.constant(op, 0), s.of(op, 1)
    axis = int(op.attributes.get("axis", 0))
    length = (s.shapes.get(op.inputs[0]) or {axis: None})[axis] if table is None else table.shape[axis]
    if length is not None and not index.within(-length, length - 1):
        _outside(s, op, index, length)
    if table is None or length is None:
        return s.of(op, 0).hull
    first, last = max(index.low, 0), min(index.high, length - 1)
    reached = table if index.low < 0 or first > last else np.take(table, range(first, last + 1), axis=axis)
    return between(int(reached.min()), int(reached.max())) if reached.size else between(0, 0)


def _outside(s: Scene, op: Op, index: Range, length: int) -> None:
    """An index that comes straight from an input is the caller's duty: runtimes refuse it, they do not wrap."""
    name = op.inputs[1]
    while (maker := s.makers.get(name)) is not None and maker.type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity"):
        name = maker.inputs[0]
    if name in s.inputs:
        s.assumptions.add(f"input {name!r} holds indices into {length} entries")
    else:
        s.problem("index", f"the index lies in {index.low}..{index.high}, the table has {length} entries")


def _reduction_axes(s: Scene, op: Op) -> tuple[Shape, tuple[int, ...]]:
    shape = s.shape(op.inputs[0])
    axes = s.constant(op, 1)
    if axes is None and s.given(op, 1):
        raise Unbounded("its axes are computed")
    return shape, reduced_axes(op, len(shape), None if axes is None else [int(a) for a in axes.reshape(-1)])


def _reduce_sum(s: Scene, op: Op) -> Range:
    shape, axes = _reduction_axes(s, op)
    a = s.of(op, 0).at_rank(len(shape))
    if a.lo.ndim != len(shape):
        a = a.at_rank(len(shape))
    detailed = tuple(i for i in axes if a.lo.ndim == len(shape) and max(a.lo.shape[i], a.hi.shape[i]) > 1)
    a = Range(*(exact(np.broadcast_to(x, np.broadcast_shapes(a.lo.shape, a.hi.shape))) for x in (a.lo, a.hi)))
    if detailed:
        a = Range(*(exact(np.sum(x, axis=detailed, keepdims=True)) for x in (a.lo, a.hi)))
    plain = tuple(shape[i] for i in axes if i not in detailed)
    return _drop(op, interval.times_count(a, *s.counts(op, plain)), axes)


def _extreme(name: str) -> Transfer:
    def transfer(s: Scene, op: Op) -> Range:
        shape, axes = _reduction_axes(s, op)
        a = s.of(op, 0).at_rank(len(shape))
        pick = np.max if name == "max" else np.min
        present = tuple(i for i in axes if i < a.lo.ndim)
        return _drop(op, Range(*(exact(pick(x, axis=present, keepdims=True)) for x in (a.lo, a.hi))), axes)

    return transfer


def _drop(op: Op, a: Range, axes: tuple[int, ...]) -> Range:
    """Without the reduced axes, unless they are kept."""
    if op.attributes.get("keepdims", 1) or not a.lo.ndim:
        return a
    return Range(exact(np.squeeze(a.lo, axes)), exact(np.squeeze(a.hi, axes)))


MOVEMENT: dict[str, Transfer] = {
    "Identity": same,
    "Expand": same,
    "Transpose": _transpose,
    "Concat": _joined,
    "Pad": _padded,
    "MaxPool": _max_pool,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Gather": _gather,
    "GatherElements": _gather,
    "ReduceSum": _reduce_sum,
    "ReduceMax": _extreme("max"),
    "ReduceMin": _extreme("min"),
    **dict.fromkeys(("Reshape", "Flatten", "Slice", "Split", "Squeeze", "Unsqueeze", "Tile", "DepthToSpace", "Resize"), _mixed),
}
