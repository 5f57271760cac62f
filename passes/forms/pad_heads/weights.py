"""Zeros in the weights of the projections: where the heads can be followed, no node is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import add_constant, fresh_name, new_node, set_constant
from qcompile.ir.notes import forget_channel_stats
from qcompile.ir.ops import const_array, const_ints, int_attr, is_op, static_shape
from qcompile.structure import Attention, Linear
from qcompile.structure.attention import trace_linear, trace_values
from qcompile.structure.channels.heads import Projection
from qcompile.structure.channels.layout import Layout
from qcompile.structure.channels.move import step
from qcompile.structure.channels.trace import Trace, start_layout

_PASSED = frozenset({"Reshape", "Transpose", "Mul", "Div", "Cast", "Identity", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class _Path:
    """Heads of `size` channels on their way from `start`, laid out as `layout`, to the one reader that computes with them."""

    start: ir.Value
    layout: Layout
    trace: Trace
    size: int


@dataclass(frozen=True)
class _Target:
    """A Reshape whose target gets `entry` at `index`."""

    node: ir.Node
    index: int
    entry: int


def pad_weights(graph: ir.Graph, block: Attention, size: int, changes: Changes) -> int | None:
    """Make the heads of `block` `size` wide; the number of values that the weights grew by, None if they cannot be followed."""
    paths = _paths(block)
    if paths is None or block.out is None:
        return None
    targets = [t for p in paths for t in _targets(p, size)]
    if None in targets:
        return None
    *heads, out = (p.size for p in paths)
    added = sum(_widen_outputs(p.linear, d, size) for p, d in zip((block.q, block.k, block.v), heads, strict=True))
    added += _widen(block.out.node, block.out.weight_slot, block.out.in_axis, out, size)
    for target in targets:
        if target is not None:
            _retarget(graph, target)
    for value in (v for path in paths for v, _ in _steps(path)):
        _rename(graph, value, changes)
    for each in (block.q, block.k, block.v):
        _rename(graph, each.linear.node.outputs[0], changes)
    return added


def _paths(block: Attention) -> list[_Path] | None:
    """q, k, v from their projections and P V to the output projection."""
    if len({block.q.linear, block.k.linear, block.v.linear}) < 3 or block.out_columns is None:
        return None
    paths = [p for each in (block.q, block.k, block.v) if (p := _path(each)) is not None]
    if len(paths) < 3 or not np.array_equal(block.out_columns, np.arange(block.v.linear.out_channels)):
        return None
    layout, traced = trace_values(paths[-1].trace.arrivals[0].layout, block.values)
    behind = _Path(block.pv.outputs[0], layout, traced, paths[-1].size)
    return [*paths, behind] if _plain(behind) else None


def _in_order(columns: NDArray[np.int64], linear: Linear) -> bool:
    """Whether head after head stands in the weight, each of them once."""
    return np.array_equal(columns.reshape(-1), np.arange(linear.out_channels))


def _path(projection: Projection) -> _Path | None:
    linear, columns = projection.linear, projection.columns
    traced, start = trace_linear(linear), start_layout(linear.output, linear.out_channels, linear.channel_axis)
    if traced is None or start is None or columns is None or not _in_order(columns, linear):
        return None
    path = _Path(linear.output, start, traced, columns.shape[1])
    return path if _plain(path) and _sizes_read(linear.node.outputs[0], start) else None


def _plain(path: _Path) -> bool:
    """One reader computes with the heads, only plain movement is in front of it, and no number is made of their size."""
    t = path.trace
    if len(t.arrivals) != 1 or t.lost or t.outputs or any(n.op_type not in _PASSED for n in t.moved):
        return False
    return all(_sizes_read(v, layout) for v, layout in _steps(path))


def _steps(path: _Path) -> Iterable[tuple[ir.Value, Layout]]:
    """Every tensor of the path, with its layout."""
    layouts = {path.start: path.layout}
    for node in path.trace.moved:
        data = next((v for v in node.inputs if v in layouts), None)
        assert data is not None
        moved = layouts[data] if is_op(node, "Mul", "Div") else step(node, layouts[data])
        assert not isinstance(moved, str)
        layouts[node.outputs[0]] = moved if isinstance(moved, Layout) else moved[0][1]
    return layouts.items()


def _sizes_read(value: ir.Value, layout: Layout) -> bool:
    """Whether those who ask for the shape want the axes that have no channels."""
    if any(is_op(n, "Size") for n, _ in value.uses()):
        return False
    picks = [g for n, _ in value.uses() if is_op(n, "Shape") for g in _picks(n)]
    indices = [None if p is None else layout.index(p) for p in picks]
    return all(i is not None and not layout.holds_channels(i) for i in indices)


def _picks(shape: ir.Node) -> Iterable[int | None]:
    """The axes that the readers of a Shape take; None for one that is not known."""
    if shape.attributes or shape.outputs[0].is_graph_output():
        yield None
    for node, _ in shape.outputs[0].uses():
        chosen = const_ints(node.inputs[1]) if is_op(node, "Gather") and int_attr(node, "axis", 0) == 0 else None
        yield from chosen or (None,)


def _targets(path: _Path, size: int) -> Iterable[_Target | None]:
    """The targets of Reshapes that name the size of a head or of all of them; None for one that cannot be written anew."""
    layouts = dict(_steps(path))
    for node in path.trace.moved:
        if is_op(node, "Reshape"):
            index = _channel_axis(layouts[node.outputs[0]], path.size)
            yield from [None] if index is None else _target(node, index, path.size, size)


def _channel_axis(layout: Layout, head: int) -> int | None:
    """The axis that holds whole heads' channels, None where a head is cut."""
    found = [(i, f.size) for i, axis in enumerate(layout.axes) for f in axis if f.stride == 1]
    size = found[0][1] if len(found) == 1 else None
    return found[0][0] if isinstance(size, int) and size % head == 0 and not layout.open else None


def _target(node: ir.Node, index: int, old: int, new: int) -> Iterable[_Target | None]:
    entry = _entry(node, index)
    if entry is None:
        yield None
    elif entry > 0:
        yield _Target(node, index, entry // old * new)


def _entry(node: ir.Node, index: int) -> int | None:
    """One number of a Reshape's target, which is constant or joined of single numbers."""
    target = const_array(node.inputs[1])
    if target is not None:
        return int(target[index])
    parts = _joined(node)
    number = const_ints(parts[index]) if parts is not None and index < len(parts) else None
    return None if number is None else number[0]


def _joined(node: ir.Node) -> Sequence[ir.Value | None] | None:
    """The numbers of a target that is a Concat of one number an axis."""
    producer = None if node.inputs[1] is None else node.inputs[1].producer()
    if not is_op(producer, "Concat") or producer is None:
        return None
    single = all(static_shape(v) == (1,) for v in producer.inputs)
    return producer.inputs if single else None


def _retarget(graph: ir.Graph, target: _Target) -> None:
    node, array = target.node, const_array(target.node.inputs[1])
    if array is not None:
        changed = array.copy()
        changed[target.index] = target.entry
        set_constant(node, 1, changed)
        return
    parts = list(_joined(node) or ())
    parts[target.index] = add_constant(graph, f"{node.name}_channels", np.array([target.entry], np.int64))
    joined = new_node(graph, "Concat", parts, name=f"{node.name}_target", like=node.inputs[1], attributes={"axis": 0})
    graph.insert_before(node, joined)
    node.replace_input_with(1, joined.outputs[0])


def _widen_outputs(linear: Linear, old: int, new: int) -> int:
    added = _widen(linear.node, linear.weight_slot, linear.out_axis, old, new)
    forget_channel_stats(linear.output)
    if linear.bias_node is None or linear.bias_slot is None or linear.bias is None:
        return added
    return added + _widen(linear.bias_node, linear.bias_slot, -1, old, new)


def _widen(node: ir.Node, slot: int, axis: int, old: int, new: int) -> int:
    """Zeros behind each `old` elements of one axis of a constant, which make them `new`."""
    array = const_array(node.inputs[slot])
    assert array is not None
    wide = widened(array, axis, old, new)
    if old != new:
        set_constant(node, slot, wide)
    return wide.size - array.size


def widened(array: NDArray[Any], axis: int, old: int, new: int) -> NDArray[Any]:
    """[..., heads * old, ...] -> [..., heads * new, ...], the new elements of each head 0."""
    last = np.moveaxis(array, axis, -1)
    heads = last.reshape(*last.shape[:-1], -1, old)
    wide = np.pad(heads, [(0, 0)] * (heads.ndim - 1) + [(0, new - old)])
    return np.moveaxis(wide.reshape(*last.shape[:-1], -1), -1, axis)


def _rename(graph: ir.Graph, value: ir.Value, changes: Changes) -> None:
    """A tensor that has another shape gets another name."""
    changes.moved.add(str(value.name))
    value.name, value.shape = fresh_name(graph, f"{value.name}_padded"), None
