"""Follow the channels of a value through data movement to every node that computes with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims, is_number, rank
from qcompile.structure.channels.layout import Layout, channels, token
from qcompile.structure.channels.move import can_step, concat_index, fills, step
from qcompile.structure.core import data_uses, label


@dataclass(frozen=True)
class Arrival:
    """A non-movement node that reads the channels at `slot`, laid out as `layout`."""

    node: ir.Node
    slot: int
    layout: Layout


@dataclass(frozen=True)
class Lost:
    """A movement node behind which the channels cannot be followed; `layout` is the one in front of it."""

    node: ir.Node
    layout: Layout
    reason: str


@dataclass(frozen=True)
class Trace:
    """Where a value's channels go: `moved` are the movement nodes passed, `filled` the Pads among them that write a constant."""

    arrivals: tuple[Arrival, ...]
    lost: tuple[Lost, ...]
    outputs: tuple[tuple[ir.Value, Layout], ...]
    moved: tuple[ir.Node, ...]

    @property
    def filled(self) -> tuple[ir.Node, ...]:
        """Pads that write a constant between the copied elements."""
        return tuple(n for n in self.moved if n.op_type == "Pad" and fills(n) is not None)


def start_layout(value: ir.Value, channel_count: int, axis: int = -1) -> Layout | None:
    """Layout of a value whose `axis` holds all channels in order; None if a needed rank is not known."""
    shape = dims(value)
    if shape is None:
        return Layout((channels(channel_count),), open=True) if axis == -1 else None
    axes = [token(d) for d in shape]
    if not -len(axes) <= axis < len(axes):
        return None
    axes[axis] = channels(channel_count)
    return Layout(tuple(axes))


def trace(value: ir.Value, layout: Layout, *, scaling: bool = False) -> Trace:
    """All ends of the movement that starts at `value`; with `scaling`, also pass through Mul and Div by one constant number."""
    return _Tracer(scaling).run(value, layout)


def is_scaling(node: ir.Node, slot: int = 0) -> bool:
    """True for Mul(x, c), Mul(c, x) and Div(x, c) with one number c, constant or made from shapes, and x at `slot`."""
    if ops.is_op(node, "Mul"):
        return is_number(node.inputs[1 - slot])
    return ops.is_op(node, "Div") and slot == 0 and is_number(node.inputs[1])


class _Tracer:
    def __init__(self, scaling: bool) -> None:
        self.scaling = scaling
        self.arrivals: list[Arrival] = []
        self.lost: list[Lost] = []
        self.outputs: list[tuple[ir.Value, Layout]] = []
        self.moved: list[ir.Node] = []
        self.joins: dict[ir.Node, dict[int, Layout]] = {}
        self.queue: deque[tuple[ir.Value, Layout]] = deque()

    def run(self, value: ir.Value, layout: Layout) -> Trace:
        self.queue.append((value, layout))
        while self.queue:
            self._visit(*self.queue.popleft())
        for node, parts in self.joins.items():
            self.lost.append(Lost(node, next(iter(parts.values())), f"{label(node)} mixes in other values"))
        return Trace(tuple(self.arrivals), tuple(self.lost), tuple(self.outputs), tuple(self.moved))

    def _visit(self, value: ir.Value, layout: Layout) -> None:
        known = rank(value)
        if layout.open and known is not None:
            layout = layout.closed(known) or layout
        if value.is_graph_output():
            self.outputs.append((value, layout))
        for node, slot in data_uses(value):
            if node.graph is not value.graph:
                self.lost.append(Lost(node, layout, f"{label(node)} reads it inside a subgraph"))
            else:
                self._use(node, slot, layout)

    def _use(self, node: ir.Node, slot: int, layout: Layout) -> None:
        if ops.is_op(node, "Concat"):
            self._join(node, slot, layout)
        elif can_step(node, slot):
            self._move(node, layout)
        elif self.scaling and slot < 2 and is_scaling(node, slot):
            self.moved.append(node)
            self.queue.append((node.outputs[0], layout))
        else:
            self.arrivals.append(Arrival(node, slot, layout))

    def _move(self, node: ir.Node, layout: Layout) -> None:
        result = step(node, layout)
        if isinstance(result, str):
            self.lost.append(Lost(node, layout, result))
            return
        self.moved.append(node)
        self.queue.extend(result)

    def _join(self, node: ir.Node, slot: int, layout: Layout) -> None:
        parts = self.joins.setdefault(node, {})
        parts[slot] = layout
        if len(parts) < len(node.inputs):
            return
        del self.joins[node]
        joined = _joined(node, list(parts.values()))
        if joined is None:
            self.lost.append(Lost(node, layout, f"channel axis lost in {label(node)} (joins channels)"))
            return
        self.moved.append(node)
        self.queue.append((node.outputs[0], joined))


def _joined(node: ir.Node, parts: list[Layout]) -> Layout | None:
    index = concat_index(node, parts[0])
    if index is None or any(p.rank != parts[0].rank or p.holds_channels(index) for p in parts):
        return None
    sizes = dims(node.outputs[0])
    merged = [p.with_axis(index, token(sizes[index] if sizes else None)) for p in parts]
    same = all(_channels_only(p) == _channels_only(merged[0]) for p in merged)
    return merged[0] if same else None


def _channels_only(layout: Layout) -> Layout:
    return replace(layout, axes=tuple(a if any(f.stride for f in a) else () for a in layout.axes))
