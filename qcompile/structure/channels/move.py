"""One step of data movement: the layout of each output of a node, or the reason why the channels are lost.

Averages over tokens (mean pooling) count as movement: they commute with every per-channel affine map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims, int_vector, rank, reshape_target, shape_vector
from qcompile.structure.channels.layout import Factor, Layout, cut, reshape, size_of, token
from qcompile.structure.core import label

Moved = list[tuple[ir.Value, Layout]]
Step = Moved | str
"""Outputs with their layouts, or a reason."""


def step(node: ir.Node, layout: Layout) -> Step:
    """Push `layout` of the data input (slot 0) through a movement node; Concat is joined by the tracer."""
    return _HANDLERS[node.op_type](node, layout)


def can_step(node: ir.Node, slot: int) -> bool:
    """True if `node` moves the data that it reads at `slot`."""
    return node.domain == "" and node.op_type in _HANDLERS and slot == 0


def concat_index(node: ir.Node, layout: Layout) -> int | None:
    """Position of the axis that a Concat joins, or None if it is not known."""
    return layout.index(ops.int_attr(node, "axis", 0))


def _lost(node: ir.Node, why: str = "") -> str:
    return f"channel axis lost in {label(node)}" + (f" ({why})" if why else "")


def _same(node: ir.Node, layout: Layout) -> Step:
    return [(node.outputs[0], layout)]


def _cast(node: ir.Node, layout: Layout) -> Step:
    kind = node.outputs[0].dtype or ir.DataType(ops.int_attr(node, "to", 1))
    return [(node.outputs[0], layout)] if kind.is_floating_point() else _lost(node, "cast to integers")


def _reshape(node: ir.Node, layout: Layout) -> Step:
    target = reshape_target(node)
    if target is None:
        return _lost(node, "its target is not known: run canonicalize")
    moved = reshape(layout, target)
    return [(node.outputs[0], moved)] if moved is not None else _lost(node)


def _flatten(node: ir.Node, layout: Layout) -> Step:
    axis = ops.int_attr(node, "axis", 1)
    if layout.rank is None:
        return _lost(node, "rank unknown: run canonicalize")
    axis += layout.rank if axis < 0 else 0
    parts = (layout.axes[:axis], layout.axes[axis:])
    return [(node.outputs[0], replace(layout, axes=tuple(tuple(f for a in part for f in a) for part in parts)))]


def _transpose(node: ir.Node, layout: Layout) -> Step:
    perm = ops.ints_attr(node, "perm")
    if perm is None:
        perm = tuple(range(layout.rank or 0))[::-1]
    closed = layout.closed(len(perm)) if perm else None
    if closed is None:
        return _lost(node, "rank unknown: run canonicalize")
    return [(node.outputs[0], replace(closed, axes=tuple(closed.axes[p] for p in perm)))]


def _axes_of(node: ir.Node) -> tuple[int, ...] | None:
    attr = ops.ints_attr(node, "axes")
    return attr if attr is not None else ops.const_ints(ops.input_at(node, 1))


def _unsqueeze(node: ir.Node, layout: Layout) -> Step:
    added = _axes_of(node)
    if added is None:
        return _lost(node, "its axes are not constant")
    if layout.rank is None:
        return _lost(node, "rank unknown: run canonicalize")
    total = layout.rank + len(added)
    places = {a % total for a in added}
    old = iter(layout.axes)
    return [(node.outputs[0], replace(layout, axes=tuple(() if i in places else next(old) for i in range(total))))]


def _squeeze(node: ir.Node, layout: Layout) -> Step:
    removed = _axes_of(node)
    if removed is None or layout.rank is None:
        return _lost(node, "its axes are not known")
    places = {a % layout.rank for a in removed}
    if any(layout.holds_channels(i) for i in places):
        return _lost(node)
    return [(node.outputs[0], replace(layout, axes=tuple(a for i, a in enumerate(layout.axes) if i not in places)))]


def _slice(node: ir.Node, layout: Layout) -> Step:
    bounds = _slice_bounds(node)
    if bounds is None:
        return _lost(node, "its axes are not constant")
    out_dims = dims(node.outputs[0])
    for axis, start, end, stride in bounds:
        index = layout.index(axis)
        if index is None:
            return _lost(node, "rank unknown: run canonicalize")
        if not layout.holds_channels(index):
            layout = layout.with_axis(index, token(out_dims[index] if out_dims else None))
            continue
        sliced = _cut(layout, index, start, end) if stride == 1 else None
        if sliced is None:
            return _lost(node, "slices the channels")
        layout = sliced
    return [(node.outputs[0], layout)]


def _slice_bounds(node: ir.Node) -> list[tuple[int, int | None, int | None, int]] | None:
    if "starts" in node.attributes:
        starts, ends = ops.ints_attr(node, "starts") or (), ops.ints_attr(node, "ends") or ()
        axes = ops.ints_attr(node, "axes") or tuple(range(len(starts)))
        return list(zip(axes, starts, ends, (1,) * len(axes), strict=True))
    starts, ends = (shape_vector(ops.input_at(node, slot)) for slot in (1, 2))
    axes, steps = (ops.const_ints(ops.input_at(node, slot)) for slot in (3, 4))
    if axes is None and ops.input_at(node, 3) is None and starts is not None:
        axes = tuple(range(len(starts)))
    if axes is None:
        return None
    if steps is None:
        steps = (1 if ops.input_at(node, 4) is None else 0,) * len(axes)
    return [(axis, _int_at(starts, i), _int_at(ends, i), steps[i]) for i, axis in enumerate(axes)]


def _int_at(values: tuple[object, ...] | None, i: int) -> int | None:
    found = values[i] if values is not None and i < len(values) else None
    return found if isinstance(found, int) else None


def _cut(layout: Layout, index: int, start: int | None, end: int | None) -> Layout | None:
    size = size_of(layout.axes[index])
    if size is None or start is None or end is None:
        return None
    low, high, _ = slice(start, end).indices(size)
    return cut(layout, index, low, high) if high > low else None


def _gather(node: ir.Node, layout: Layout) -> Step:
    index = layout.index(ops.int_attr(node, "axis", 0))
    if index is None:
        return _lost(node, "rank unknown: run canonicalize")
    chosen, extra = ops.const_ints(ops.input_at(node, 1)), rank(ops.input_at(node, 1))
    if extra is None:
        return _lost(node, "rank of its indices unknown: run canonicalize")
    if layout.holds_channels(index):
        return _gather_channels(node, layout, index, chosen, extra)
    shape = dims(ops.input_at(node, 1)) or (None,) * extra
    return [(node.outputs[0], _with_axes(layout, index, tuple(token(d) for d in shape)))]


def _gather_channels(node: ir.Node, layout: Layout, index: int, chosen: tuple[int, ...] | None, extra: int) -> Step:
    size = size_of(layout.axes[index])
    if not chosen or size is None:
        return _lost(node, "gathers channels")
    low = chosen[0] % size
    if [c % size for c in chosen] != list(range(low, low + len(chosen))):
        return _lost(node, "gathers channels")
    taken = cut(layout, index, low, low + len(chosen))
    if taken is None:
        return _lost(node, "gathers channels")
    return [(node.outputs[0], taken if extra else _with_axes(taken, index, ()))]


def _with_axes(layout: Layout, index: int, axes: tuple[tuple[Factor, ...], ...]) -> Layout:
    return replace(layout, axes=layout.axes[:index] + axes + layout.axes[index + 1 :])


def _split(node: ir.Node, layout: Layout) -> Step:
    index = layout.index(ops.int_attr(node, "axis", 0))
    if index is None:
        return _lost(node, "rank unknown: run canonicalize")
    sizes = _split_sizes(node, size_of(layout.axes[index]))
    if not layout.holds_channels(index):
        return [(out, layout.with_axis(index, token(sizes[i]))) for i, out in enumerate(node.outputs)]
    moved: Moved = []
    start = 0
    for out, size in zip(node.outputs, sizes, strict=True):
        part = cut(layout, index, start, start + size) if size else None
        if part is None or size is None:
            return _lost(node, "splits the channels")
        moved.append((out, part))
        start += size
    return moved


def _split_sizes(node: ir.Node, total: int | None) -> tuple[int | None, ...]:
    given = ops.ints_attr(node, "split") or ops.const_ints(ops.input_at(node, 1))
    count = len(node.outputs)
    if given is not None and len(given) == count:
        return given
    if total is None or given is not None or ops.input_at(node, 1) is not None:
        return (None,) * count
    each = -(-total // count)
    return tuple(min(each, total - i * each) for i in range(count))


def _pad(node: ir.Node, layout: Layout) -> Step:
    pads = padding(node, layout.rank)
    if pads is None:
        return _lost(node, "its pads are not constant: run canonicalize")
    if layout.rank is None:
        return [(node.outputs[0], layout)] if not any(pads.values()) else _lost(node, "rank unknown: run canonicalize")
    out_dims = dims(node.outputs[0])
    for axis, amount in pads.items():
        if amount != (0, 0) and layout.holds_channels(axis):
            return _lost(node, "pads the channels")
        if amount != (0, 0):
            layout = layout.with_axis(axis, token(out_dims[axis] if out_dims else None))
    return [(node.outputs[0], layout)]


def padding(node: ir.Node, rank: int | None) -> dict[int, tuple[int, int]] | None:
    """Axis -> (before, after) of a Pad; None when they are not constant.  Negative axes need `rank`."""
    pads = ops.ints_attr(node, "pads") or int_vector(ops.input_at(node, 1))
    if pads is None:
        return None
    count = len(pads) // 2
    axes = ops.const_ints(ops.input_at(node, 3)) or tuple(range(count))
    if rank is None and any(a < 0 for a in axes):
        return None
    return {a % rank if rank else a: (pads[i], pads[i + count]) for i, a in enumerate(axes)}


def fills(node: ir.Node) -> float | None:
    """The constant that a Pad writes; None if it writes nothing (all pads 0) or copies (edge, reflect, wrap)."""
    pads = ops.ints_attr(node, "pads") or int_vector(ops.input_at(node, 1))
    if ops.str_attr(node, "mode", "constant") != "constant" or (pads is not None and not any(p > 0 for p in pads)):
        return None
    value = ops.input_at(node, 2)
    filled = ops.float_attr(node, "value", 0.0) if value is None else ops.const_scalar(value)
    return float("nan") if filled is None else filled


def _expand(node: ir.Node, layout: Layout) -> Step:
    target = reshape_target(node)
    if target is None or layout.rank is None:
        return _lost(node, "its shape is not known: run canonicalize")
    axes = ((),) * (len(target) - layout.rank) + layout.axes
    if len(axes) != len(target):
        return _lost(node)
    return [(node.outputs[0], replace(layout, axes=tuple(a or token(d) for a, d in zip(axes, target, strict=True))))]


def _tile(node: ir.Node, layout: Layout) -> Step:
    repeats = ops.const_ints(ops.input_at(node, 1))
    if repeats is None or layout.rank != len(repeats):
        return _lost(node, "its repeats are not constant")
    axes = (a if r == 1 else (Factor(r), *a) for a, r in zip(layout.axes, repeats, strict=True))
    return [(node.outputs[0], replace(layout, axes=tuple(axes)))]


def _mean(node: ir.Node, layout: Layout) -> Step:
    axes = ops.ints_attr(node, "axes") or ops.const_ints(ops.input_at(node, 1))
    if layout.rank is None or not axes:
        return _lost(node, "averages over unknown axes")
    places = {a % layout.rank for a in axes}
    if any(layout.holds_channels(i) for i in places):
        return _lost(node, "averages over the channels")
    keep = bool(ops.int_attr(node, "keepdims", 1))
    kept = (() if i in places else a for i, a in enumerate(layout.axes) if keep or i not in places)
    return [(node.outputs[0], replace(layout, axes=tuple(kept)))]


def _global_pool(node: ir.Node, layout: Layout) -> Step:
    if layout.rank is None or any(layout.holds_channels(i) for i in range(2, layout.rank)):
        return _lost(node, "averages over the channels")
    return [(node.outputs[0], replace(layout, axes=layout.axes[:2] + ((),) * (layout.rank - 2)))]


_HANDLERS: dict[str, Callable[[ir.Node, Layout], Step]] = {
    "Cast": _cast,
    "Dropout": _same,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GlobalAveragePool": _global_pool,
    "Identity": _same,
    "Pad": _pad,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
